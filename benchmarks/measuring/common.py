"""What every benchmark writes beside its numbers: machine, versions, revision."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import singe


def machine() -> dict[str, Any]:
    """A description of where numbers come from."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "revision": _revision(),
        "singe": singe.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a script as JSON; only the last part of paths, since the rest depends on the machine."""
    return {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()}


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes ``result`` with the machine's description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors; equal values share the mean of their ranks."""
    ranks = [torch.gt(v[:, None], v).double().sum(1) - torch.lt(v[:, None], v).double().sum(1) for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for name, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.2f} s"


def mebibytes(count: int | None) -> str:
    """Bytes in MiB; a dash where unknown."""
    return "-" if count is None else f"{count / 2**20:.0f}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _revision() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
