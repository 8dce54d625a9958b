"""How the time of a forward pass is spread over a network: module by module."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .. import checks
from ..models.batches import Batch
from ..models.isolation import evaluating, preserved_random_state
from ..task import Task
from .latency import call_seconds, now

_WARM_UP = 3


def module_times(models: Sequence[nn.Module], batch: Batch, task: Task, rounds: int) -> list[dict[str, float]]:
    """How long each module takes by itself, without the modules that it calls; in eval mode, models in turns.

    A disturbance of a forward pass hits only a few of its modules, different ones each time. So their medians are
    steadier than the median of the whole.

    Args:
        models: on one device each; not modified.
        batch: what they are called with.
        task: how they are called.
        rounds: how many calls of each are timed, after a few warm-up calls.

    Returns:
        for each model, module name -> median seconds; its own name is "". Modules that are not called are left out.
    """
    with evaluating(models), preserved_random_state(), torch.no_grad():
        turns = [[_once(model, batch, task) for model in models] for _ in range(_WARM_UP + rounds)][_WARM_UP:]
    return [
        {name: statistics.median(once[name] for once in calls) for name in calls[0]}
        for calls in zip(*turns, strict=True)
    ]


def _once(model: nn.Module, batch: Batch, task: Task) -> dict[str, float]:
    with _clocked(model) as seconds:
        call_seconds(model, batch, task)
    return dict(seconds)


@contextmanager
def _clocked(model: nn.Module) -> Iterator[dict[str, float]]:
    """Module name -> seconds that it takes by itself while this is open; only modules that are called."""
    seconds: dict[str, float] = defaultdict(float)
    device, running = checks.device_of(model), list[list[float]]()  # of each module that is running: start, in others

    def enter(*_: Any) -> None:
        running.append([now(device), 0.0])

    def leave(name: str) -> None:
        start, inside = running.pop()
        took = now(device) - start
        seconds[name] += took - inside
        if running:
            running[-1][1] += took

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(lambda *_, name=name: leave(name)).remove)
        yield seconds
