"""From rho, the share of the cost to remove, to a number of units for each part."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

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


def check_reach(cost: Cost, choices: Sequence[Sequence[int]], rho: float, why: str = "") -> None:
    """Raises ValueError if the parts cannot lose a share ``rho`` of the cost; says how much they can, and ``why``."""
    share = reach(cost, choices)
    if rho > share:
        digits = 4 - math.ceil(math.log10(share)) if share else 0
        limit = math.floor(share * 10**digits) / 10**digits
        raise ValueError(f"expected rho <= {limit:g}, which removes all that can be removed, got {rho}{why}")


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

    def search(level: float) -> _Search:
        return _Search(cost, choices, schedule(level), rho * cost.total)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        at = search(middle)
        low, high = (middle, high) if at.missing(at.base) >= 0 else (low, middle)
    below, above = search(low), search(high)
    found = below.adjusted()
    if not below.is_near(found):
        found = min(found, above.adjusted(), key=lambda chosen: abs(below.missing(chosen)))
    return below.removed(found)


class _Search:
    """Looks for choices near those that a schedule wants, by which as much goes as is to go.

    Args:
        cost, choices: as in :func:`fit`.
        wanted: how many units each part is to lose by the schedule.
        target: the cost that is to go.

    Attributes:
        base: for each part, the index of the choice nearest to what is wanted.
    """

    def __init__(self, cost: Cost, choices: Sequence[Sequence[int]], wanted: Sequence[float], target: float) -> None:
        self._cost, self._choices, self._wanted, self._target = cost, choices, wanted, target
        self.base = [_nearest(own, lost) for own, lost in zip(choices, wanted, strict=True)]

    def removed(self, chosen: Sequence[int]) -> list[int]:
        """How many units each part loses by the choices of these indices."""
        return [own[i] for own, i in zip(self._choices, chosen, strict=True)]

    def missing(self, chosen: Sequence[int]) -> float:
        """How much more is to go."""
        return self._target - self._cost.gone(self.removed(chosen))

    def is_near(self, chosen: Sequence[int]) -> bool:
        """Whether less than the smallest move is missing."""
        missing, parts = self.missing(chosen), range(len(chosen))
        moves = [
            abs(missing - self.missing(m)) for i in parts for step in (-1, 1) for m in self._moves(chosen, i, step)
        ]
        return abs(missing) < max(self._cost.grain, min(moves))

    def adjusted(self) -> list[int]:
        """The base, with parts moved by single choices, none further than needed to come within the smallest move."""
        chosen = self.base
        for far in range(1, max(map(len, self._choices))):
            chosen = self._moved(chosen, far)
            if self.is_near(chosen):
                break
        return chosen

    def _moved(self, chosen: list[int], far: int) -> list[int]:
        """Moves parts while that comes closer, at most so far from the base: first as fits, then beyond the target."""
        for beyond in (False, True):
            while (closer := self._closer(chosen, far, beyond)) is not None:
                chosen = closer
        return chosen

    def _closer(self, chosen: list[int], far: int, beyond: bool) -> list[int] | None:
        """One part moved so that less is missing: of all such moves, the one that stays nearest to what is wanted."""
        missing = self.missing(chosen)
        step = 1 if missing > 0 else -1
        for i in sorted(range(len(chosen)), key=lambda i: self._strays(i, chosen[i] + step)):
            for trial in self._moves(chosen, i, step):
                gap = self.missing(trial)
                if abs(trial[i] - self.base[i]) <= far and abs(gap) < abs(missing) and (beyond or gap >= 0):
                    return trial
        return None

    def _strays(self, part: int, index: int) -> float:
        """How far a choice is from what is wanted, as a share of what the part may lose."""
        own = self._choices[part]
        return abs(own[index] - self._wanted[part]) / own[-1] if 0 <= index < len(own) else math.inf

    def _moves(self, chosen: Sequence[int], part: int, step: int) -> list[list[int]]:
        """The choices with another one for a part, if there is one."""
        index = chosen[part] + step
        return [[*chosen[:part], index, *chosen[part + 1 :]]] if 0 <= index < len(self._choices[part]) else []


def _nearest(choices: Sequence[int], value: float) -> int:
    """Index of the ascending choice that is nearest to a value."""
    above = bisect_left(choices, value)
    if above == 0 or above == len(choices):
        return min(above, len(choices) - 1)
    return above - (value - choices[above - 1] <= choices[above] - value)
