"""The result of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from . import checks, report
from .graph.trace import Forward, answer, plain
from .models.batches import length
from .records import GroupRecord, LatencyChange, Record, RoundRecord
from .removal.plan import Plan
from .report import Facts, table
from .storage import saved
from .task import Task
from .timing.latency import latencies

R = TypeVar("R", GroupRecord, RoundRecord)

ROUNDS, TIMED = 20, 8
"""Rounds in which latencies are measured at the end of a run, and samples in a batch, where the model takes any
number."""


@dataclass(frozen=True, eq=False, repr=False)
class PruneResult(Generic[R]):
    """A pruned network and how it came about; ``print`` it for a summary.

    Attributes:
        model: the same class with smaller tensors; train mode and requires_grad as in the model given.
        plan: which neurons were removed; applies to a fresh copy of the unpruned model.
        params_before, params_after: parameters, tied ones counted once.
        macs_before, macs_after: multiply-adds for one sample.
        loss_before, loss_after: on one batch of calibration samples, in eval mode.
        history: one record per pruned group, in order; of gradual pruning, one per round.
        frozen: the groups that were left whole, and the modules whose weights could not be followed -> why.
        uncompensated: the layers that could not be refitted when all were, after the last group -> why.
        evaluation_before, evaluation_after: what ``evaluate`` returned for the unpruned and the pruned network; None
            without it.
        latency: how long a forward pass takes; None where it was not measured, as on all ranks of ``torch.distributed``
            but the first.
        widths: name of every convolution and linear layer -> output channels before and after.
        settings: what decided the run and where it ran, as text.
        seconds: activity -> the time it took.
    """

    model: nn.Module
    plan: Plan
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    loss_before: float
    loss_after: float
    history: list[R]
    frozen: dict[str, str]
    uncompensated: dict[str, str] = field(default_factory=dict)
    evaluation_before: float | None = None
    evaluation_after: float | None = None
    latency: LatencyChange | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def params_removed(self) -> float:
        """Share of the parameters that is gone, in [0, 1]."""
        return 1 - self.params_after / self.params_before

    @property
    def macs_removed(self) -> float:
        """Share of the multiply-adds that is gone, in [0, 1]."""
        return 1 - self.macs_after / self.macs_before if self.macs_before else 0.0

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``plan.json``, ``model.safetensors`` and ``report.json`` into a directory, which is created.

        See ``singe.load`` and ``singe.report.write_report``.
        """
        saved.save(self.model, self.plan, directory)
        report.save(self._facts(), directory)

    def report(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``report.html``, a page to look at, and its plots as PNG files into a directory, which is created.

        Returns:
            where the page is.

        Raises:
            ImportError: matplotlib is missing.
        """
        return report.write(self._facts(), directory)

    def _facts(self) -> Facts:
        return Facts(
            model=type(self.model).__name__,
            parameters=(self.params_before, self.params_after), macs=(self.macs_before, self.macs_after),
            loss=(self.loss_before, self.loss_after), evaluation=(self.evaluation_before, self.evaluation_after),
            latency=self.latency, widths=self.widths, history=tuple(self.history), frozen=self.frozen,
            uncompensated=self.uncompensated, settings=self.settings, seconds=self.seconds,
        )  # fmt: skip

    def __repr__(self) -> str:
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
        if self.latency is not None:
            name, change = f"latency, batch of {self.latency.samples}", f"{-self.latency.removed:+.1%}"
            rows.insert(2, [name, str(self.latency.before), str(self.latency.after), change])
        frozen = "".join(f"\nleft whole: {name} ({reason})" for name, reason in self.frozen.items())
        refused = "".join(f"\nnot refitted: {name} ({reason})" for name, reason in self.uncompensated.items())
        return table(["", "before", "after", "change"], rows) + frozen + refused


def compared(before: nn.Module, after: nn.Module, inputs: Any, task: Task) -> LatencyChange:
    """How long a forward pass of two networks takes; in eval mode, on copies of the first."""
    first, second = latencies([checks.working_copy(before), after], inputs, forward=task.forward, rounds=ROUNDS)
    return LatencyChange(first, second, length(inputs))


def widths(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every convolution and linear layer of a network -> its output channels before and after pruning."""
    now = dict(after.named_modules())
    layers = [(name, m) for name, m in before.named_modules() if isinstance(m, (nn.Linear, _ConvNd)) and name in now]
    return {name: (_width(layer), _width(now[name])) for name, layer in layers}


def _width(layer: nn.Module) -> int:
    width: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[assignment]
    return width


def spent(seconds: Mapping[str, float], history: Sequence[Record]) -> dict[str, float]:
    """Activity -> the time it took, in a run and in its records together."""
    total = dict(seconds)
    names = {"scoring": "scoring", "compensating": "compensating", "tuning": "fine-tuning"}
    for attribute, name in names.items():
        total[name] = total.get(name, 0.0) + sum(getattr(r, f"seconds_{attribute}", 0.0) for r in history)
    return {name: value for name, value in total.items() if value}


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: Any, forward: Forward = plain) -> int:
    """Multiply-adds of ``forward(model, inputs)`` for one sample: torch's flop count over two, in the model's mode."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), warnings.catch_warnings(), _attention_in_parts(), counter:
        # the counter hooks all modules, which compiled ones warn about
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)`", UserWarning)
        answer(model, inputs, forward)
    return counter.get_total_flops() // 2 // length(inputs)


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Attention out of operators that the flop counter knows; it counts nothing for most fused ones."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
