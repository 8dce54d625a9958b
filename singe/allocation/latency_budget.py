"""From a share of the latency to a number of neurons per group: fitted to a table, and measured as a whole."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol

from torch import Tensor, nn

from ..graph.groups import Group
from ..models.batches import Batch
from ..models.copies import copy_of
from ..removal.plan import Plan
from ..task import Task
from ..timing.latency import latencies
from ..timing.module_times import module_times
from .fit import check_reach, fit, reach, removable
from .goal import Goal
from .latency_cost import LatencyCost, LatencyTable, Lost

log = logging.getLogger("singe")

LEVELS = (0.0, 0.25, 0.5, 0.75, 0.875, 1.0)
"""Which share of all its neurons every group loses in the networks that the table is made of."""

TOLERANCE = 0.02
"""How much more of the latency may be removed than asked for."""

TRIES = 8
"""The most widths that are measured as a whole."""

_ROUNDS_MODULES = 15
_ROUNDS_WHOLE = 30


class Meter(Protocol):
    """Measures how long networks take that have lost neurons; the networks of one call are measured in turns."""

    def modules(self, networks: Sequence[Lost]) -> list[dict[str, float]]:
        """For each network, module name -> seconds that it takes without the modules that it calls."""

    def whole(self, networks: Sequence[Lost]) -> list[float]:
        """Seconds of a forward pass of each network."""


class Machine:
    """Measures on this machine, with torch's number of threads; which neurons are gone does not affect the time.

    Args:
        model: unpruned; not modified.
        groups: those that lose neurons.
        batch: what a network is called with, with as many samples as the latency is for.
        task: how it is called.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], batch: Batch, task: Task) -> None:
        self._model, self._groups, self._batch, self._task = model, groups, batch, task

    def modules(self, networks: Sequence[Lost]) -> list[dict[str, float]]:
        """See :class:`Meter`."""
        return module_times(self._made(networks), self._batch, self._task, _ROUNDS_MODULES)

    def whole(self, networks: Sequence[Lost]) -> list[float]:
        """See :class:`Meter`."""
        example, forward = self._task.inputs(self._batch), self._task.forward
        found = latencies(self._made(networks), example, forward=forward, rounds=_ROUNDS_WHOLE)
        return [latency.median for latency in found]

    def _made(self, networks: Sequence[Lost]) -> list[nn.Module]:
        return [self._cut(removed) for removed in networks]

    def _cut(self, removed: Lost) -> nn.Module:
        pairs = zip(self._groups, map(range, removed), strict=True)
        return Plan.of(pairs).apply(copy_of(self._model))


def counts_within(
    goal: Goal, model: nn.Module, groups: Sequence[Group], meter: Meter, scores: Callable[[], list[Tensor]]
) -> list[int]:
    """How many neurons each group will lose so that a share ``goal.rho`` of the latency goes.

    Widths are fitted to the table and measured as a whole; the result corrects the next fit, until the budget is met
    or no better widths are found.

    Args:
        goal: what is asked for.
        model: unpruned, without weight norms.
        groups: those that may lose neurons, in execution order.
        meter: measures networks.
        scores: returns scores to rank the neurons of all groups by; called where the allocation is a ranking.

    Raises:
        ValueError: rho is out of reach.
    """
    choices = [removable(g, goal.round_to, goal.max_rate) for g in groups]
    cost = _measured(model, groups, choices, meter)
    check_reach(cost, choices, goal.rho)
    schedule, whole = goal.schedule(model, groups, cost, scores), [0] * len(groups)
    tried: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for turn in range(TRIES):
        aim = _halfway(cost.shares, goal.rho) if turn >= TRIES // 2 else goal.rho + TOLERANCE / 2
        counts = tuple(fit(cost, choices, schedule, min(aim, reach(cost, choices))))
        before, after = meter.whole([whole, counts])
        cost.learn(counts, 1 - after / before)
        tried[counts].append(1 - after / before)
        log.info("latency: %.3g ms of %.3g ms; %.1f%% are to be removed", 1e3 * after, 1e3 * before, 100 * goal.rho)
        if goal.rho <= fmean(tried[counts]) <= goal.rho + TOLERANCE:
            return list(counts)
    return _nearest(tried, goal.rho)


def _measured(model: nn.Module, groups: Sequence[Group], choices: Sequence[Sequence[int]], meter: Meter) -> LatencyCost:
    """The cost of networks, from those at a few levels."""
    networks = [[_level(own, level) for own in choices] for level in LEVELS]
    table = LatencyTable(model, groups, networks, meter.modules(networks))
    seconds = meter.whole(networks)
    cost = LatencyCost(table, seconds[0], networks[-1])
    for removed, after in zip(networks[1:], seconds[1:], strict=True):
        cost.learn(removed, 1 - after / seconds[0])
    log.info("latency: %.3g ms, at the least %.3g ms", 1e3 * seconds[0], 1e3 * seconds[-1])
    return cost


def _level(choices: Sequence[int], level: float) -> int:
    return min(choices, key=lambda count: abs(count - level * choices[-1]))


def _halfway(shares: Sequence[float], rho: float) -> float:
    """Between the nearest shares on either side: where time falls in steps, a straight line is no guide."""
    below = max((s for s in shares if s < rho), default=0.0)
    return (below + min((s for s in shares if s > rho + TOLERANCE), default=max(shares))) / 2


def _nearest(tried: dict[tuple[int, ...], list[float]], rho: float) -> list[int]:
    """The measured widths that miss the budget by least, preferring too fast to too slow."""
    shares = {counts: fmean(measured) for counts, measured in tried.items()}
    best = min(shares, key=lambda counts: (shares[counts] < rho, abs(shares[counts] - rho)))
    log.warning(
        "no widths were found that take %g to %g of the latency away; the nearest that were measured take %.3g",
        rho, rho + TOLERANCE, shares[best],
    )  # fmt: skip
    return list(best)
