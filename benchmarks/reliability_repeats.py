"""Memory of a process that prunes again and again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe


def measure(count: int, seed: int) -> dict[str, Any]:
    """Resident MiB after each of ``count`` prunes of a small network, exports and fine-tuning included."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    samples = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,)))
    loader = DataLoader(samples, batch_size=32, shuffle=True)
    resident, began = [], time.perf_counter()
    for _ in range(count):
        singe.prune(model, loader, 0.4, finetune=singe.FineTune(steps=4), images=32, progress=False)
        resident.append(resident_mebibytes())
    half = np.asarray(resident[count // 2 :])
    slope = np.polyfit(np.arange(len(half)), half, 1)[0] * 1024 if len(half) > 1 else 0.0
    return {
        "prunes": count, "seconds": time.perf_counter() - began, "kibibytes_per_prune": float(slope),
        "resident_mebibytes": resident[:: max(1, count // 100)] + resident[-1:],
    }  # fmt: skip


def resident_mebibytes() -> float:
    """Of this process; Linux only."""
    line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def text(found: dict[str, Any]) -> str:
    """One line on what came out."""
    first, *_, last = found["resident_mebibytes"]
    return (
        f"{found['prunes']} prunes in {found['seconds']:.0f} s: {first:.0f} MiB after the first, {last:.0f} MiB after "
        f"the last, {found['kibibytes_per_prune']:+.2f} KiB a prune over the second half"
    )
