"""The peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def with_peak(way: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What a call returns, and its peak bytes above what was in use before; None where this is unknown.

    On a CPU these are resident bytes of the whole process, which only Linux reports; on a GPU those of tensors.
    Too few where the process, with several threads, has failed to allocate before: from then on glibc serves the
    thread from another arena, and what lies free at the end of that cannot be given back, and is filled unnoticed.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return way(), torch.cuda.max_memory_allocated(device) - before
    _give_back()
    level = _reset_peak()
    result = way()
    return result, None if level is None else max(0, _resident("VmHWM") - level)


def _give_back() -> None:
    """Returns free memory to the system, or the next call would fill it unnoticed; only glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> int | None:
    """The resident bytes when the peak is reset; None where it cannot be reset."""
    try:
        _RESET.write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
