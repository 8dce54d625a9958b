"""From rho, the share of the cost to remove, to a number of units for each part."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from ..graph.groups import Group
from .cost import Cost
from .schedules import Schedule


def removable(group: Group, round_to: int, max_rate: float = 1) -> list[int]:
    """How many neurons a group may lose, ascending from 0.

    Args:
        group: with its neurons.
        round_to: all its layers keep a multiple of so many rows.
        max_rate: share of its neurons that it loses at most.
    """
    rows = [group.written(writer).multiplicity for writer in group.writers]
    step = math.lcm(*(round_to // math.gcd(round_to, r) for r in rows))
    counts = sorted(group.size - kept for kept in range(step, group.size, step))
    return [0, *(count for count in counts if count <= most(group.size, max_rate))]


def most(size: int, max_rate: float) -> int:
    """How many of ``size`` units, at least one of which stays, a share ``max_rate`` is."""
    return min(size - 1, math.floor(max_rate * size + 1e-9))  # .9 of 10 is 9


def reach(cost: Cost, choices: Sequence[Sequence[int]]) -> float:
    """The share of the cost that is gone when everything removable is removed."""
    return cost.gone([c[-1] for c in choices]) / cost.total


def check_reach(cost: Cost, choices: Sequence[Sequence[int]], rho: float) -> None:
    """Raises ValueError if the parts cannot lose a share ``rho`` of the cost; says how much they can."""
    share = reach(cost, choices)
    if rho > share:
        digits = 4 - math.ceil(math.log10(share)) if share else 0
        limit = math.floor(share * 10**digits) / 10**digits
        raise ValueError(f"expected rho <= {limit:g}, which removes all that can be removed, got {rho}")


def fit(cost: Cost, choices: Sequence[Sequence[int]], schedule: Schedule, rho: float) -> list[int]:
    """Units to remove from each part so that a share ``rho`` of the cost goes.

    Args:
        cost: of the parts.
        choices: for each part, how many units it may lose, ascending from 0.
        schedule: which parts lose more than others.
        rho: share of the whole cost to remove, in (0, 1).

    Returns:
        for each part, one of its choices: within one smallest move of rho where single moves lead there; otherwise such
        that no move of a single part comes closer.

    Raises:
        ValueError: rho is out of reach; says how large it can be.
    """
    check_reach(cost, choices, rho)
    target = rho * cost.total

    def at(level: float) -> list[int]:
        """Which choice is nearest for each part at a level."""
        return [_nearest(own, lost) for own, lost in zip(choices, schedule(level), strict=True)]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _gone(cost, choices, at(middle)) <= target else (low, middle)
    return _removed(choices, _adjusted(cost, choices, at(low), target))


def _nearest(choices: Sequence[int], value: float) -> int:
    """Index of the ascending choice that is nearest to a value."""
    above = bisect_left(choices, value)
    if above == 0 or above == len(choices):
        return min(above, len(choices) - 1)
    return above - (value - choices[above - 1] <= choices[above] - value)


def _adjusted(cost: Cost, choices: Sequence[Sequence[int]], base: list[int], target: float) -> list[int]:
    """Moves parts forward or back by single choices, none further than needed to come within the smallest move."""
    chosen = base
    for far in range(1, max(map(len, choices))):
        chosen = _moved(cost, choices, chosen, target, [range(b - far, b + far + 1) for b in base])
        gone = _gone(cost, choices, chosen)
        moves = [abs(gone - _gone(cost, choices, near)) for near in _neighbours(choices, chosen)]
        if abs(target - gone) < max(cost.grain, min(moves)):
            break
    return chosen


def _moved(
    cost: Cost, choices: Sequence[Sequence[int]], chosen: list[int], target: float, allowed: Sequence[range]
) -> list[int]:
    """Moves parts, the most expensive first, while that comes closer: first moves that fit, then beyond the target."""
    missing = target - _gone(cost, choices, chosen)
    for beyond in (False, True):
        changed = True
        while changed:
            changed = False
            removed = _removed(choices, chosen)
            for i in sorted(range(len(choices)), key=lambda i: -cost.unit(removed, i)):
                trial = list(chosen)
                trial[i] += 1 if missing > 0 else -1
                if not 0 <= trial[i] < len(choices[i]) or trial[i] not in allowed[i]:
                    continue
                gap = target - _gone(cost, choices, trial)
                if abs(gap) < abs(missing) and (beyond or gap >= 0):
                    chosen, missing, changed = trial, gap, True
    return chosen


def _neighbours(choices: Sequence[Sequence[int]], chosen: Sequence[int]) -> Iterator[list[int]]:
    """All choices that differ in one part by one step."""
    for i, own in enumerate(choices):
        for other in (chosen[i] - 1, chosen[i] + 1):
            if 0 <= other < len(own):
                yield [*chosen[:i], other, *chosen[i + 1 :]]


def _removed(choices: Sequence[Sequence[int]], chosen: Sequence[int]) -> list[int]:
    return [own[i] for own, i in zip(choices, chosen, strict=True)]


def _gone(cost: Cost, choices: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    return cost.gone(_removed(choices, chosen))
