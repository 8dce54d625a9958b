"""CIFAR-10's canonical files with few and random records."""

from __future__ import annotations

from pathlib import Path

import torch

PER_FILE = 32


def write_records(folder: Path) -> Path:
    """Five files to train on and one to test on, :data:`PER_FILE` records in each; returns the folder."""
    generator = torch.Generator().manual_seed(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = torch.randint(10, (PER_FILE, 1), generator=generator)
        pixels = torch.randint(256, (PER_FILE, 3072), generator=generator)
        (folder / f"{name}.bin").write_bytes(torch.cat([labels, pixels], 1).byte().numpy().tobytes())
    return folder
