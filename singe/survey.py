"""Which parts of a network may lose neurons, and why the rest may not, found before anything is removed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .bars import bar
from .graph.analysis import analyse
from .graph.groups import Group, module_of
from .graph.trace import Trace, named_tensors, trace
from .models.batches import Batch, head
from .removal.trial import Trials
from .task import Task

log = logging.getLogger("singe")

LeftWhole = Callable[[Sequence[Group]], dict[str, str]]
"""All groups -> names of those that may not lose neurons, whatever the reason -> why."""


@dataclass(frozen=True)
class Survey:
    """The groups of a network.

    Attributes:
        groups: all of them, in execution order.
        whole: names of those that may not lose neurons -> why.
        unfollowed: modules with weights that are in no group -> why.
    """

    groups: list[Group]
    whole: dict[str, str]
    unfollowed: dict[str, str]

    @property
    def able(self) -> list[Group]:
        """The groups that may lose neurons."""
        return [g for g in self.groups if g.name not in self.whole]

    @property
    def frozen(self) -> dict[str, str]:
        """All groups and modules that are left unchanged -> why."""
        return self.unfollowed | self.whole


def survey(
    work: nn.Module,
    graph: Trace,
    sample: Any,
    task: Task,
    left_whole: LeftWhole,
    seconds: float = math.inf,
    progress: bool = False,
) -> Survey:
    """Finds the groups and tries on copies which of them can be removed.

    Args:
        work: the model in eval mode; not modified.
        graph: its trace.
        sample: what the model is called with, for a few samples; see :func:`sample_inputs`.
        task: how the model is called.
        left_whole: says which groups are not even tried.
        seconds: how long this may take.
        progress: whether to show a bar.

    Raises:
        TimeoutError: it takes longer.
    """
    began = time.monotonic()
    training = _in_training(work, graph, sample, task)
    groups, unfollowed = analyse(graph, training)
    unfollowed = dict.fromkeys(_uncalled(work, graph, training), _UNCALLED) | unfollowed
    names = {g.name for g in groups}  # a module may hold a weight that is followed beside one that is not
    unfollowed = {name: reason for name, reason in unfollowed.items() if name not in names}
    whole = left_whole(groups)
    with bar(desc="trial removals", unit="trial", shown=progress, inside=True) as shown:
        trials = Trials(work, sample, task.call, seconds, began, shown.update)
        able, unsafe = _tried(trials, [g for g in groups if g.name not in whole])
    tried = {g.name: g for g in able}
    return Survey([tried.get(g.name, g) for g in groups], whole | unsafe, unfollowed)


_UNCALLED = "not called on this example, or its result unused; code that calls it finds the channels it reads changed"


def _uncalled(work: nn.Module, graph: Trace, training: Trace | None) -> list[str]:
    """The modules with parameters of which no trace uses any."""
    tensors, traces = named_tensors(work), [graph] if training is None else [graph, training]
    used = {id(tensors[name]) for own in traces for name in own.used()}  # tied ones go by several names
    owners = {name: owner for name, _ in work.named_parameters() if (owner := module_of(name))}
    called = {owner for name, owner in owners.items() if id(tensors[name]) in used}
    return [owner for owner in owners.values() if owner not in called]


def _tried(trials: Trials, groups: list[Group]) -> tuple[list[Group], dict[str, str]]:
    """The groups with the integer attributes that do count their neurons, and the unsafe groups -> why."""
    others = {g.name: iter(_readings(g)) for g in groups}
    current = {name: next(readings) for name, readings in others.items()}
    unsafe: dict[str, str] = {}
    while True:
        unsafe |= trials.unsafe([g for g in current.values() if g.name not in unsafe])
        passed = _passed(trials, {name: others[name] for name in unsafe})
        if not passed:
            return list(current.values()), unsafe
        current |= passed
        for name in passed:
            del unsafe[name]


def _passed(trials: Trials, readings: Mapping[str, Iterator[Group]]) -> dict[str, Group]:
    """The first reading of each group, where there is one, that passes without the network's other groups."""
    passed: dict[str, Group] = {}
    while turn := {
        name: reading
        for name, left in readings.items()
        if name not in passed and (reading := next(left, None)) is not None
    }:
        failed = trials.unsafe(list(turn.values()))
        passed |= {name: reading for name, reading in turn.items() if name not in failed}
    return passed


def _readings(group: Group) -> list[Group]:
    """The group with all integer attributes that are as large as it is, or fewer: some may be so by chance.

    Where two of one module are of one size, at most one of them probably counts neurons, so those come first.
    """
    widths = [s for s in group.slices if s.role == "width"]
    places = [(module_of(s.tensor), len(s.neuron)) for s in widths]
    twins = [s for s, place in zip(widths, places, strict=True) if places.count(place) > 1]
    fewer = [twins, *([other for other in twins if other is not one] for one in twins)] if twins else []
    dropped = [*fewer, [], *([widths] if len(widths) > len(twins) else [])]
    return [replace(group, slices=tuple(s for s in group.slices if s not in gone)) for gone in dropped]


def _in_training(work: nn.Module, graph: Trace, sample: Any, task: Task) -> Trace | None:
    """A trace in train mode of a model with parameters that eval mode does not use; None where there are none."""
    if {name for name, _ in work.named_parameters()} <= set(graph.used()):
        return None
    try:
        return trace(work.train(), sample, task.call)
    except ValueError as error:  # trial removals run in train mode as well
        log.info("train mode cannot be looked at: %s", error)
        return None
    finally:
        work.eval()


def sample_inputs(batch: Batch, graph: Trace, task: Task, count: int = 2) -> Any:
    """What a model is called with for a few samples of a batch, where it takes any number of them."""
    return task.inputs(head(batch, count) if graph.dynamic else batch)
