"""How many neurons each group of a network is to lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import checks
from ..allocation.latency_budget import Machine, counts_within
from ..allocation.schedules import RANKINGS
from ..allocation.sensitivity import SAMPLES, Sensitivity
from ..bars import bar
from ..graph.groups import Group
from ..models.batches import head, parts
from ..models.isolation import seed_everything
from ..ranks import ALONE
from ..refit.compensation import Compensator
from ..refit.equations import Wanted
from ..scoring.scores import unscorable
from ..scoring.selection import order
from ..survey import survey
from .neuron_workspace import MEASURED, RANKED, NeuronWorkspace

_ORDERED_ON = 16
"""The most samples to order neurons on, where the loss without them is measured anyway."""


def able_groups(space: NeuronWorkspace, seconds: float) -> tuple[list[Group], dict[str, str]]:
    """The groups that may lose neurons, and what is left whole -> why.

    Args:
        space: of a run that has begun.
        seconds: how long trial removals on copies may take.

    Raises:
        TimeoutError: they take longer.
        ValueError: no group may lose neurons.
    """
    o = space.options
    left_whole = partial(o.goal.left_whole, space.original)
    with space.timed("analysis"):
        found = survey(space.model, space.trace, space.sample, o.task, left_whole, seconds, o.progress)
    blind = unscorable(space.trace, found.able, o.criterion, space.probe)
    able, frozen = [g for g in found.able if g.name not in blind], found.frozen | blind
    checks.something_to_prune("neurons", able, frozen)
    return able, frozen


def counts(space: NeuronWorkspace, groups: Sequence[Group], whole: Mapping[str, str]) -> list[int]:
    """How many neurons each group will lose; where the clock decides, as the first rank has measured.

    Args:
        space: of a run that has begun.
        groups: those that may lose neurons.
        whole: names of what is left whole -> why.
    """
    goal = space.options.goal
    if space.served is None:
        return goal.counts(space.model, groups, space.trace, space.macs_of, lambda: _ranking(space, groups), whole)
    ranking = _ranking(space, groups) if goal.allocation in RANKINGS else []
    found = [0] * len(groups)
    if space.ranks.first:  # the others wait, and disturb no measurement
        machine = Machine(space.given, groups, space.served, space.options.task)
        found = counts_within(goal, space.original, groups, machine, lambda: ranking)
    return space.ranks.from_first(torch.tensor(found)).tolist()


def _ranking(space: NeuronWorkspace, groups: Sequence[Group]) -> list[Tensor]:
    """Values to rank all neurons of the unpruned network by: scores, or how the loss depends on their group.

    Each rank computes those of some groups.
    """
    o, ranks = space.options, space.ranks
    measured = _sensitivity(space) if o.goal.allocation == "sensitivity" else None
    samples = space.probe if measured is None or not space.trace.dynamic else head(space.probe, _ORDERED_ON)
    values = [torch.zeros(g.size, dtype=torch.float64) for g in groups]
    with bar(range(ranks.rank, len(groups), ranks.size), desc="ranking", unit="group", shown=o.progress) as shown:
        for index in shown:
            seed_everything((o.seed << 20) + RANKED + index)
            scorer = space.scorer(groups[index], samples, space.wanted, ALONE)
            values[index] = (
                scorer.scores(o.criterion)
                if measured is None
                else measured.prices(groups[index], order(scorer, o.criterion))
            )
    return list(ranks.sum(torch.cat(values)).split([g.size for g in groups]))


def _sensitivity(space: NeuronWorkspace) -> Sensitivity:
    o, graph = space.options, space.trace
    size = min(o.images, SAMPLES) if graph.dynamic else graph.example_batch
    fit = min(size, graph.samples_within(o.memory // 2, 8 * graph.largest()))
    step = min(range(fit, fit // 2, -1), key=lambda n: size % n)  # batches of one length, however size divides
    size -= size % step
    space.restart(MEASURED)
    drawn = [space.stream.take(size) for _ in range(-(-SAMPLES // size))]
    batches = [part for batch in drawn for part in parts(batch, step)]
    few = None if o.compensate == "none" else space.drawn(min(o.compensation_images, SAMPLES))
    wanted = None if few is None else Wanted(space.model, graph, few, o.task, o.memory)
    compensator = None if wanted is None else Compensator(wanted, o.compensate)
    return Sensitivity(space.model, graph, batches, o.task, compensator, o.memory)
