"""Seconds of a call: by the clock on a CPU, by CUDA events on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch

Way = Callable[[], Any]
Result = TypeVar("Result")
Name = TypeVar("Name", bound=Hashable)


def timed(way: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a call returns, and its seconds."""
    if device.type == "cuda":
        return _timed_by_events(way, device)
    start = time.perf_counter()
    result = way()
    return result, time.perf_counter() - start


def in_turns(ways: Mapping[Name, Way], rounds: int, device: torch.device) -> dict[Name, float]:
    """Median seconds of each, taken in turns so that all see the same machine; warm them up before."""
    times: dict[Name, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(timed(way, device)[1])
    return {name: statistics.median(own) for name, own in times.items()}


def call_all(ways: Iterable[Way]) -> None:
    """Calls each once; a first call warms it up, too: it chooses kernels and allocates."""
    for way in ways:
        way()


def _timed_by_events(way: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        start.record()
        result = way()
        end.record()
        end.synchronize()
    return result, start.elapsed_time(end) / 1e3
