"""What a run would remove, and how long it would take: measured on a few of its steps, on copies."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from .criteria import Criterion
from .graph.groups import Group
from .graph.weights import Weight
from .models.copies import copy_of
from .observer import Observer
from .prune import Arguments, prepared, prune
from .ranks import ALONE
from .records import GroupRecord
from .refit.compensation import reached
from .removal.plan import Plan
from .removal.surgery import Removed
from .runs.group import Turn
from .runs.neurons import NeuronRun
from .runs.run import Run
from .runs.weights import WeightRun
from .runs.workspace import Workspace
from .scoring.selection import Refresh
from .sizes import count_parameters
from .storage.checkpoint import Checkpoint
from .table import table
from .timing.stopwatch import Stopwatch, duration
from .training.finetune import Tuner
from .training.recalibration import recalibrate

if TYPE_CHECKING:
    from typing_extensions import Unpack  # torch brings it

SAMPLED = 15.0
"""Seconds in which parts of the network are sampled: as many as there is time for, at least two."""

TRIED = 15.0
"""Seconds that groups which are pruned on a copy may take, all together; at least one is pruned."""

_CLEAR = 0.2
"""Seconds that a measurement takes at least, if it can."""

_STEPS = 4
_IMAGES = 256
_STILL = 1e-30
"""A learning rate that moves nothing."""

T = TypeVar("T")


class Part(NamedTuple):
    """A group of neurons, or a weight tensor: its name, how many there are, and how many of them will be removed."""

    name: str
    size: int
    removed: int


@dataclass(frozen=True, repr=False)
class Forecast:
    """What :func:`singe.prune` would do; ``print`` it for a table.

    Attributes:
        parts: the groups of neurons (or weight tensors) that lose some and are still to be pruned.
        frozen: what is left whole -> why.
        sizes: of the network: "parameters" and "multiply-adds", or "weights" -> before and after.
        seconds: activity -> how long it takes, estimated.
        measured: what the estimates are based on.
    """

    parts: tuple[Part, ...]
    frozen: dict[str, str]
    sizes: dict[str, tuple[int, int]]
    seconds: dict[str, float]
    measured: tuple[str, ...]

    @property
    def total(self) -> float:
        """Seconds that the run would take."""
        return sum(self.seconds.values())

    def __repr__(self) -> str:
        goes = [[name, f"{size:,}", f"{gone:,}", f"{size - gone:,}"] for name, size, gone in self.parts]
        sizes = [
            [name, f"{before:,}", f"{after:,}", f"-{1 - after / before:.1%}" if before else ""]
            for name, (before, after) in self.sizes.items()
        ]
        spent = ", ".join(f"{what} {duration(seconds)}" for what, seconds in self.seconds.items())
        return "\n".join([
            table(["would lose", "units", "gone", "left"], goes),
            *(f"left whole: {name} ({reason})" for name, reason in self.frozen.items()),
            "",
            table(["", "before", "after", "change"], sizes),
            "",
            f"would take about {duration(self.total)}: {spent}",
            *(f"  {line}" for line in self.measured),
        ])  # fmt: skip


def forecast(
    model: nn.Module, loader: Iterable[Any], rho: float, *, structured: bool = True, **arguments: Unpack[Arguments]
) -> Forecast:
    """What :func:`singe.prune` would remove with the same arguments, and how long that would take on this machine.

    The groups and their numbers of neurons are those that the run would decide on; the neurons themselves are not
    chosen. Time is estimated: scoring from some neurons of a sample of the groups, interpolating between them; how
    often neurons are scored again, and refitting, from some groups that are pruned on a copy; fine-tuning from a few
    steps of the unpruned network and of one as narrow as the result. Takes as long as the run's own preparation, and
    about half a minute more; longer where a single pass takes seconds. No file is written; if there is a checkpoint,
    the forecast starts from it.

    Args:
        model: as for :func:`singe.prune`; not modified.
        loader: likewise.
        rho: likewise.
        structured: likewise.
        arguments: the others of :func:`singe.prune`, under their names.

    Raises:
        Exception: what :func:`singe.prune` raises before it starts work.
    """
    given = inspect.signature(prune).bind(model, loader, rho, structured=structured, **arguments)
    given.apply_defaults()
    start = time.perf_counter()
    with prepared(NeuronForecaster, WeightForecaster, given.arguments, ALONE) as run:
        return run.forecast(time.perf_counter() - start)


class _Reader(Run):
    """A run that leaves no checkpoint."""

    def _opened(self) -> Checkpoint | None:
        """A run would make the directory if there is none."""
        directory = self.space.options.checkpoint
        return super()._opened() if directory is not None and os.path.exists(directory) else None


class NeuronForecaster(_Reader, NeuronRun):
    """A run that measures itself instead of being executed; it is of no use afterwards."""

    def forecast(self, preparation: float) -> Forecast:
        """What is left to do, and how long that takes.

        Args:
            preparation: seconds spent up to here, which the run takes, too.
        """
        space, progress = self.space, self.space.progress
        todo, plan = self.todo[len(progress.history) :], self._plan()
        narrow = plan.apply(copy_of(space.given)).eval()
        if self.resumes:
            self.resume()
        seconds, measured = {"preparation": preparation}, list[str]()
        self._time_training(narrow, plan, len(todo) / max(1, len(self.todo)), seconds, measured)
        _time_recalibration(space, narrow, seconds)
        _time_evaluations(space, narrow, len(todo), seconds)
        pruned = self._time_groups(todo, seconds, measured) if todo else progress.history
        if not progress.tuned:
            self._time_refitting(todo, pruned, seconds)
        macs = self.space.macs_of(narrow)
        parameters = count_parameters(self.space.given), count_parameters(narrow)
        return Forecast(
            parts=tuple(Part(group.name, group.size, count) for group, count in todo), frozen=self.frozen,
            sizes={"parameters": parameters, "multiply-adds": (self.space.macs, macs)},
            seconds=seconds, measured=tuple(measured),
        )  # fmt: skip

    def _plan(self) -> Plan:
        """A plan that makes a network as narrow as the result will be."""
        return Plan.of((group, range(count)) for group, count in self.todo)

    def _time_training(
        self, narrow: nn.Module, plan: Plan, left: float, seconds: dict[str, float], measured: list[str]
    ) -> None:
        """Times fine-tuning.

        Args:
            narrow: a copy as narrow as the result.
            plan: what has been removed from it.
            left: share of the groups that are still to be pruned.
            seconds: activity -> how long it takes; added to.
            measured: what the estimates are based on; added to.
        """
        o = self.space.options
        if o.finetune is None:
            return
        left = 1.0 if o.finetune.when == "after" else left
        if (steps := (o.finetune.steps - self.space.progress.tuned) * left) > 0:
            first, last = (
                _step(self.space, network, self.space.original, removed)
                for network, removed in ((self.space.model, {}), (narrow, plan.removed()))
            )
            each = last if o.finetune.when == "after" else (first + last) / 2
            seconds["fine-tuning"] = each * steps
            measured.append(
                f"fine-tuning from {_STEPS} steps of the unpruned network ({first:.2g} s each) and {_STEPS} of one as "
                f"narrow as the result ({last:.2g} s)"
            )

    def _time_groups(
        self, todo: list[tuple[Group, int]], seconds: dict[str, float], measured: list[str]
    ) -> list[GroupRecord]:
        """Adds how long scoring takes; returns the records of some groups that it prunes of the working copy."""
        o = self.space.options
        sampled = _sampled(len(todo), lambda i: self._time_scoring(todo[i][0]))
        begin, each = (_interpolated({i: pair[k] for i, pair in sampled.items()}, len(todo)) for k in (0, 1))
        records = self._try(todo, [b + e * group.size for b, e, (group, _) in zip(begin, each, todo, strict=True)])
        again = sum(r.neurons_scored - r.size for r in records) / sum(len(r.removed) for r in records)
        renewing = o.finetune is not None and o.finetune.when == "neuron"
        seconds["scoring"] = sum(
            b * (1 + renewing * count) + e * _scores(group.size, count, o.refresh, o.criterion, again)
            for b, e, (group, count) in zip(begin, each, todo, strict=True)
        )
        measured.append(
            f"scoring from neurons of {len(sampled)} of {len(todo)} groups, and {len(records)} pruned on a copy, which "
            f"took {again:.1f} scores per removal in addition to each neuron's first"
        )
        return records

    def _time_refitting(
        self, todo: list[tuple[Group, int]], pruned: list[GroupRecord], seconds: dict[str, float]
    ) -> None:
        """Tells how long refitting takes, from what it took where groups were pruned."""
        if self.space.options.compensate == "none":
            return
        layers = {group.name: len(group.readers) for group, _ in self.todo}
        a_layer = sum(r.seconds_compensating for r in pruned) / max(1, sum(layers[r.group] for r in pruned))
        seconds["compensating"] = a_layer * (sum(layers[group.name] for group, _ in todo) + self._refitted_last())

    def _refitted_last(self) -> int:
        """How many layers are refitted once more at the end."""
        if not self.refits_all:
            return 0
        owned = {s.tensor for group, _ in self.todo for s in group.slices}
        return len(reached(self.space.trace, owned))

    def _time_scoring(self, group: Group) -> tuple[float, float]:
        """Seconds until the first score, and of one neuron's."""
        start = time.perf_counter()
        self.space.restart(0)
        batch = self.space.stream.take(self.space.options.images)
        current, criterion = self.space.progress.plan.rebase(group), self.space.options.criterion
        scorer = self.space.scorer(current, batch, self.space.wanted)
        begin = time.perf_counter() - start
        neurons = group.size if criterion.scores_together else 1
        while True:
            start = time.perf_counter()
            scorer.scores(criterion, torch.arange(neurons))
            if (seconds := time.perf_counter() - start) > _CLEAR or neurons == group.size:
                return begin, seconds / neurons
            neurons = min(2 * neurons, group.size)

    def _try(self, todo: list[tuple[Group, int]], seconds: Sequence[float]) -> list[GroupRecord]:
        """Prunes groups from all over the network that should fit into the time, and the quickest in any case."""
        records: list[GroupRecord] = []
        watch, quickest = Stopwatch(), min(range(len(todo)), key=seconds.__getitem__)
        for index in _spread(len(todo)):
            if watch.seconds + seconds[index] <= TRIED or index == quickest:
                with watch:
                    records.append(Turn(self.space, index, *todo[index], None).take())
        return records


class WeightForecaster(_Reader, WeightRun):
    """The same for single weights."""

    def forecast(self, preparation: float) -> Forecast:
        """What is to be done, and how long that takes.

        Args:
            preparation: seconds spent up to here, which the run takes, too.
        """
        done = len(self.space.progress.history)
        todo = self.todo[done:]
        if self.resumes:
            self.resume()
        seconds, measured = {"preparation": preparation}, list[str]()
        if todo:
            sampled = _sampled(len(todo), lambda i: self._time_scoring(todo[i][0]))
            seconds["scoring"] = sum(_interpolated(sampled, len(todo)))
            measured.append(f"scoring from {len(sampled)} of {len(todo)} layers")
        left = self._steps_left(len(todo))
        if left:
            step = _step(self.space, self.space.model, self.space.given, {})
            seconds["fine-tuning"] = step * left
            measured.append(f"fine-tuning from {_STEPS} steps ({step:.2g} s each)")
        _time_recalibration(self.space, self.space.model, seconds)
        _time_evaluations(self.space, None, len(todo), seconds)
        gone = sum(count for _, count in self.todo)
        return Forecast(
            parts=tuple(Part(weight.name, weight.size, count) for weight, count in todo), frozen=self.frozen,
            sizes={"weights": (self.weights.total, self.weights.total - gone)},
            seconds=seconds, measured=tuple(measured),
        )  # fmt: skip

    def _steps_left(self, layers: int) -> int:
        finetune = self.space.options.finetune
        if finetune is None:
            return 0
        if finetune.when == "after":
            return max(0, finetune.steps - self.space.progress.tuned)
        return finetune.steps * layers // max(1, len(self.todo))

    def _time_scoring(self, weight: Weight) -> float:
        self.space.restart(0)
        watch = Stopwatch()
        with watch:
            self.scores(weight, self.space.stream.take(self.space.options.images))
        return watch.seconds


def _scores(size: int, count: int, refresh: Refresh, criterion: Criterion, again: float) -> float:
    """How many neurons are scored while a group of ``size`` loses ``count``.

    Args:
        size: neurons of the group.
        count: how many go.
        refresh: which of the others are scored again.
        criterion: whose scores.
        again: how many neurons were scored again per removal in other groups; 0 where scores last.
    """
    if not again:
        return size
    if criterion.scores_together:
        return size * count
    if refresh == "full":
        return sum(size - gone for gone in range(count))
    return size + again * count


def _step(space: Workspace, network: nn.Module, unpruned: nn.Module, removed: Removed) -> float:
    """Seconds of a step of fine-tuning a network, which is left unchanged."""
    o, work, watch = space.options, copy_of(network), Stopwatch()
    assert o.finetune is not None and space.tuner is not None
    for steps in (1, _STEPS):  # the first is slow
        how = replace(o.finetune, steps=steps, when="after", lr=_STILL)
        tuner = Tuner(how, work, space.stream, o.task, space.still, unpruned=unpruned, removed=lambda: removed)
        tuner.reentrant = space.tuner.reentrant
        watch = Stopwatch()
        with watch:
            tuner.train_stage()
    return watch.seconds / _STEPS


def _time_recalibration(space: Workspace, network: nn.Module, seconds: dict[str, float]) -> None:
    """Tells how long the last passes of batch norms take, if there are any.

    Args:
        space: of a run that was rehearsed.
        network: as narrow as the result; its statistics change.
        seconds: what takes time -> how long; added to.
    """
    o, watch = space.options, Stopwatch()
    if o.recalibrate_bn:
        images = min(o.recalibrate_bn, _IMAGES)
        with watch:
            recalibrate(network, space.stream, o.task, images, space.still)
        seconds["recalibrating"] = watch.seconds * o.recalibrate_bn / images


def _time_evaluations(space: Workspace, narrow: nn.Module | None, records: int, seconds: dict[str, float]) -> None:
    """Tells what the user's ``evaluate`` takes after each record and of the result, and calls it no more.

    Args:
        space: of a run that was rehearsed, for which the unpruned network was evaluated.
        narrow: one as narrow as the result, if that is narrower.
        records: of the run.
        seconds: what takes time -> how long; added to.
    """
    observer, once = space.options.observer, space.seconds_evaluating
    space.options = replace(space.options, observer=Observer())
    if space.evaluation_before is None:
        return
    if narrow is not None:
        watch = Stopwatch()
        with watch:
            observer.evaluation(narrow)
        once = (once + watch.seconds) / 2
    seconds["evaluate"] = once * (records + 1)


def _spread(count: int) -> list[int]:
    """0 to ``count`` - 1, in an order whose beginning is spread over all."""
    strides = [1 << power for power in reversed(range(count.bit_length()))]
    return list(dict.fromkeys((count - 1, *(i for stride in strides for i in range(0, count, stride)))))


def _sampled(count: int, measure: Callable[[int], T]) -> dict[int, T]:
    """Measurements of some of ``count`` parts, as many as time allows."""
    found: dict[int, T] = {}
    start = time.perf_counter()
    for index in _spread(count):
        if len(found) > 1 and time.perf_counter() - start > SAMPLED:
            break
        found[index] = measure(index)
    return found


def _interpolated(known: dict[int, float], count: int) -> list[float]:
    """A value for each of ``count`` parts, interpolated linearly between those that are known."""
    at = sorted(known)
    values: list[float] = np.interp(range(count), at, [known[i] for i in at]).tolist()
    return values
