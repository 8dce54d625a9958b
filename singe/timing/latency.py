"""How long a forward pass takes: measured once times have settled, several models in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import checks, values
from ..graph.trace import Forward
from ..models.batches import Batch, copied
from ..models.isolation import callers_settings, evaluating, preserved_random_state
from ..task import Task

WARM_UP = 50
"""The most warm-up calls of each model: the first ones choose kernels, allocate, and wake the processor up."""

_RECENT = 3
_SETTLED = 0.95


@dataclass(frozen=True)
class Latency:
    """Seconds of a forward pass; ``print`` it for milliseconds.

    Attributes:
        median: of all calls that were timed.
        lower, upper: the quartiles: half of the calls lie between them.
        rounds: how many calls were timed.
    """

    median: float
    lower: float
    upper: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """The latency of these calls, at least one."""
        lower, median, upper = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
        return cls(median, lower, upper, len(seconds))

    def __str__(self) -> str:
        lower, median, upper = (f"{1e3 * s:.3g}" for s in (self.lower, self.median, self.upper))
        return f"{median} ms ({lower} to {upper})"


def latency(model: nn.Module, example: Any, *, forward: Forward | None = None, rounds: int = 30) -> Latency:
    """How long a forward pass of a model takes.

    Args:
        model: any module with its parameters on one device, wrapped or compiled too; runs as it is, in eval mode and
            without gradients. Its train mode and the random state are as before when this returns.
        example: a batch x as ``model(x)`` takes it, with as many samples as the latency is for; moved to the model's
            device before the clock starts.
        forward: (model, example) -> outputs, for a model not called as ``model(x)``; the example is then any nested
            tensors.
        rounds: how many calls are timed, once times have settled.

    Returns:
        median and quartiles, in seconds.

    Raises:
        TypeError, ValueError: bad input, or a model that fails on the example.
    """
    return latencies([model], example, forward=forward, rounds=rounds)[0]


def latencies(
    models: Sequence[nn.Module], example: Any, *, forward: Forward | None = None, rounds: int = 30
) -> list[Latency]:
    """How long a forward pass of each model takes, in turns: anything that slows the machine slows all of them.

    So their ratios hold even where the times themselves do not. Arguments and errors are those of :func:`latency`.
    """
    if isinstance(models, nn.Module):
        raise TypeError(f"expected a list of modules, got {type(models).__name__}; one model is for singe.latency")
    for model in models:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a module to time, got {type(model).__name__}")
    if not models:
        raise ValueError("expected at least one model to time, got none")
    values.integer("rounds", rounds, 1)
    task = Task(forward)
    batches = [checks.example(example, checks.device_of(model), task) for model in models]
    with evaluating(models), preserved_random_state(), torch.no_grad():
        for model, batch in zip(models, batches, strict=True):
            checks.answers(model, batch, task)
        return in_turns([partial(call_seconds, m, b, task) for m, b in zip(models, batches, strict=True)], rounds)


def in_turns(calls: Sequence[Callable[[], float]], rounds: int) -> list[Latency]:
    """Makes calls in turns, first until their times have settled, then ``rounds`` times.

    Args:
        calls: each returns how many seconds it took.
        rounds: how many calls of each count.
    """
    warm_up: list[list[float]] = [[] for _ in calls]
    while len(warm_up[0]) < WARM_UP and not all(map(_settled, warm_up)):
        for call, seconds in zip(calls, warm_up, strict=True):
            seconds.append(call())
    turns = [[call() for call in calls] for _ in range(rounds)]
    return [Latency.of(seconds) for seconds in zip(*turns, strict=True)]


def call_seconds(model: nn.Module, batch: Batch, task: Task) -> float:
    """Seconds of one call, until its last kernel is done; the batch is copied before, as some models write into it."""
    inputs, device = copied(task.inputs(batch)), checks.device_of(model)
    with callers_settings():
        start = now(device)
        task.call(model, inputs)
        return now(device) - start


def now(device: torch.device) -> float:
    """Seconds on a clock that waits for the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _settled(seconds: Sequence[float]) -> bool:
    """Whether the best of the last calls is hardly better than the best before: noise only makes calls slower."""
    before, recent = seconds[:-_RECENT], seconds[-_RECENT:]
    return bool(before) and min(recent) >= _SETTLED * min(before)
