"""The result of a run."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from . import checks, report
from .models.batches import length
from .records import GroupRecord, LatencyChange, Record, RoundRecord, WeightRecord
from .removal.plan import Plan
from .report import Facts
from .storage import saved
from .table import table
from .task import Task
from .timing.latency import latencies

R = TypeVar("R", GroupRecord, RoundRecord, WeightRecord)

ROUNDS, TIMED = 20, 8
"""Rounds in which latencies are measured at the end of a run, and samples in a batch, where the model takes any
number."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Result(ABC, Generic[R]):
    """A network and how it came about; ``print`` it for a summary.

    Attributes:
        model: of the class given; train mode and requires_grad as there.
        params_before, params_after: parameters, tied ones counted once.
        loss_before, loss_after: on one batch of calibration samples, in eval mode.
        history: one record for each step, in order.
        frozen: what was left whole -> why.
        evaluation_before, evaluation_after: what ``evaluate`` returned for the unpruned and the pruned network; None
            without it.
        settings: what decided the run and where it ran, as text.
        seconds: activity -> the time it took.
    """

    model: nn.Module
    params_before: int
    params_after: int
    loss_before: float
    loss_after: float
    history: list[R]
    frozen: dict[str, str]
    evaluation_before: float | None = None
    evaluation_after: float | None = None
    settings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def params_removed(self) -> float:
        """Share of all parameters that is gone, in [0, 1]."""
        return 1 - self.params_after / self.params_before

    @abstractmethod
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes what ``singe.load`` reads, and ``report.json``, into a directory, which is created."""

    def report(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``report.html``, a page to look at, and its plots as PNG files into a directory, which is created.

        Returns:
            where the page is.

        Raises:
            ImportError: matplotlib is missing.
        """
        return report.write(self._facts(), directory)

    def __repr__(self) -> str:
        rows = [
            *self._sizes(),
            ["loss", *(f"{x:.4f}" if math.isfinite(x) else "-" for x in (self.loss_before, self.loss_after)), ""],
        ]
        if self.evaluation_before is not None and self.evaluation_after is not None:
            rows.append(["evaluation", f"{self.evaluation_before:.4g}", f"{self.evaluation_after:.4g}", ""])
        return "\n".join([table(["", "before", "after", "change"], rows), *self._notes()])

    @abstractmethod
    def _sizes(self) -> list[list[str]]:
        """Rows of what has become less: its name, before, after, and the change."""

    def _notes(self) -> list[str]:
        return [f"left whole: {name} ({reason})" for name, reason in self.frozen.items()]

    def _facts(self) -> Facts:
        return Facts(
            model=type(self.model).__name__, parameters=(self.params_before, self.params_after),
            loss=(self.loss_before, self.loss_after), evaluation=(self.evaluation_before, self.evaluation_after),
            history=tuple(self.history), frozen=self.frozen, settings=self.settings, seconds=self.seconds,
            **self._own_facts(),
        )  # fmt: skip

    @abstractmethod
    def _own_facts(self) -> dict[str, Any]:
        """Those of a kind of results alone."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PruneResult(Result[R]):
    """A pruned network and how it came about; ``print`` it for a summary.

    Attributes:
        model: the same class with smaller tensors; train mode and requires_grad as in the model given.
        plan: which neurons were removed; applies to a fresh copy of the unpruned model.
        params_before, params_after: parameters, tied ones counted once.
        macs_before, macs_after: multiply-adds for one sample.
        loss_before, loss_after: on one batch of calibration samples, in eval mode.
        history: one record per pruned group, in order; of gradual pruning, one per round.
        frozen: the groups that were left whole, and the modules whose weights could not be followed or that are not
            called -> why.
        uncompensated: the layers that could not be refitted when all were, after the last group -> why.
        evaluation_before, evaluation_after: what ``evaluate`` returned for the unpruned and the pruned network; None
            without it.
        latency: how long a forward pass takes.
        widths: name of every convolution and linear layer -> output channels before and after.
        settings: what decided the run and where it ran, as text.
        seconds: activity -> the time it took.
    """

    plan: Plan
    macs_before: int
    macs_after: int
    uncompensated: dict[str, str] = field(default_factory=dict)
    latency: LatencyChange | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)

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

    def _sizes(self) -> list[list[str]]:
        rows = [
            ["parameters", f"{self.params_before:,}", f"{self.params_after:,}", f"-{self.params_removed:.1%}"],
            ["multiply-adds", f"{self.macs_before:,}", f"{self.macs_after:,}", f"-{self.macs_removed:.1%}"],
        ]
        if self.latency is not None:
            name, change = f"latency, batch of {self.latency.samples}", f"{-self.latency.removed:+.1%}"
            rows.append([name, str(self.latency.before), str(self.latency.after), change])
        return rows

    def _notes(self) -> list[str]:
        return super()._notes() + [f"not refitted: {name} ({reason})" for name, reason in self.uncompensated.items()]

    def _own_facts(self) -> dict[str, Any]:
        macs = self.macs_before, self.macs_after
        return {"macs": macs, "latency": self.latency, "widths": self.widths, "uncompensated": self.uncompensated}


def compared(before: nn.Module, after: nn.Module, inputs: Any, task: Task) -> LatencyChange:
    """How long a forward pass of two networks takes; in eval mode, on copies of the first."""
    first, second = latencies([checks.working_copy(before), after], inputs, forward=task.forward, rounds=ROUNDS)
    return LatencyChange(first, second, length(inputs))


def spent(seconds: Mapping[str, float], history: Sequence[Record]) -> dict[str, float]:
    """Activity -> the time it took, in a run and in its records together."""
    total = dict(seconds)
    names = {"scoring": "scoring", "compensating": "compensating", "tuning": "fine-tuning"}
    for attribute, name in names.items():
        total[name] = total.get(name, 0.0) + sum(getattr(r, f"seconds_{attribute}", 0.0) for r in history)
    return {name: value for name, value in total.items() if value}
