"""What a run hands back."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import saved
from .batches import length
from .graph.trace import Forward, answer, plain
from .latency import Latency
from .plan import Plan
from .report import table


@dataclass(frozen=True)
class GroupRecord:
    """What happened to one group of coupled neurons.

    Attributes:
        group: its name, that of its first layer.
        size: neurons it had.
        removed: those removed, in order, counted in the unpruned model.
        scores: the score of each when it was removed.
        neurons_scored: scores computed, repetitions included.
        loss_start: loss on the group's own batch before the first removal.
        loss_removed: after the last, before fine-tuning.
        loss_end: after compensation and fine-tuning.
        seconds_scoring: time spent choosing neurons.
        seconds_compensating: time spent refitting what reads them.
        seconds_tuning: time spent fine-tuning.
        uncompensated: the readers that could not be refitted -> why; empty where none was to be.
    """

    group: str
    size: int
    removed: tuple[int, ...]
    scores: tuple[float, ...]
    neurons_scored: int
    loss_start: float
    loss_removed: float
    loss_end: float
    seconds_scoring: float
    seconds_compensating: float
    seconds_tuning: float
    uncompensated: dict[str, str]


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round of gradual pruning.

    Attributes:
        epoch: behind which it took place, counted from 1.
        removed: group -> neurons masked in this round, least relevant first, counted in the unpruned model.
        scores: group -> the score of each, as ranked: divided by the L2 norm of its group's scores.
        channels: how many output channels of layers these neurons own together.
        loss_start: loss on the round's samples in eval mode before these neurons were masked.
        loss_removed: after.
        seconds: that the round took.
    """

    epoch: int
    removed: dict[str, tuple[int, ...]]
    scores: dict[str, tuple[float, ...]]
    channels: int
    loss_start: float
    loss_removed: float
    seconds: float


@dataclass(frozen=True, eq=False)
class PruneResult:
    """A pruned network and how it came about; ``print`` it for a summary.

    Attributes:
        model: the same class with smaller tensors; train mode and requires_grad as in the model given.
        plan: which neurons were removed; applies to a fresh copy of the unpruned model.
        params_before, params_after: parameters, tied ones counted once.
        macs_before, macs_after: multiply-adds for one sample.
        loss_before, loss_after: on one batch of calibration samples, in eval mode.
        history: one record per pruned group, in order; of gradual pruning, one per round.
        frozen: the groups that were left whole, and the modules whose weights could not be followed -> why.
        latency_before, latency_after: of a forward pass of the unpruned network and of this one, measured in turns
            where ``target`` is "latency"; else None.
    """

    model: nn.Module
    plan: Plan
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    loss_before: float
    loss_after: float
    history: list[GroupRecord] | list[RoundRecord]
    frozen: dict[str, str]
    latency_before: Latency | None = None
    latency_after: Latency | None = None

    @property
    def params_removed(self) -> float:
        """Share of the parameters that is gone, in [0, 1]."""
        return 1 - self.params_after / self.params_before

    @property
    def macs_removed(self) -> float:
        """Share of the multiply-adds that is gone, in [0, 1]."""
        return 1 - self.macs_after / self.macs_before if self.macs_before else 0.0

    @property
    def latency_removed(self) -> float | None:
        """Share of the latency that is gone, below 0 where it has grown; None where it was not measured."""
        if self.latency_before is None or self.latency_after is None:
            return None
        return 1 - self.latency_after.median / self.latency_before.median

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``plan.json`` and ``model.safetensors`` into a directory, which is created; see ``singe.load``."""
        saved.save(self.model, self.plan, directory)

    def __str__(self) -> str:
        rows = [
            [
                "parameters",
                f"{self.params_before:,}",
                f"{self.params_after:,}",
                f"-{self.params_removed:.1%}",
            ],
            ["multiply-adds", f"{self.macs_before:,}", f"{self.macs_after:,}", f"-{self.macs_removed:.1%}"],
            ["loss", f"{self.loss_before:.4f}", f"{self.loss_after:.4f}", ""],
        ]
        if self.latency_removed is not None:
            change = f"{-self.latency_removed:+.1%}"
            rows.insert(2, ["latency", str(self.latency_before), str(self.latency_after), change])
        frozen = "".join(f"\nleft whole: {name} ({reason})" for name, reason in self.frozen.items())
        return table(["", "before", "after", "change"], rows) + frozen


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: Any, forward: Forward = plain) -> int:
    """Multiply-adds of ``forward(model, inputs)`` for one sample: torch's flop count over two, in the model's mode."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), warnings.catch_warnings(), counter:
        # the counter hooks all modules, which torch.compile's tell about
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)`", UserWarning)
        answer(model, inputs, forward)
    return counter.get_total_flops() // 2 // length(inputs)
