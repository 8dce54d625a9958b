"""A rising curve through measured points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np


class Rising:
    """The rising curve nearest to values measured with noise, linear between points.

    Beyond the outermost points it is constant.

    Args:
        points: (x, y), at least one; where several have the same x, their mean counts.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        at: dict[float, list[float]] = defaultdict(list)
        for x, y in points:
            at[x].append(y)
        self._x = sorted(at)
        self._y = _rising([at[x] for x in self._x])

    def __call__(self, x: float) -> float:
        return float(np.interp(x, self._x, self._y))


def _rising(measured: list[list[float]]) -> list[float]:
    """The rising sequence of least squared distance: neighbours that fall are pooled (isotonic regression)."""
    pools: list[tuple[list[float], int]] = []  # values, and for how many neighbours they stand
    for values in measured:
        pool = values, 1
        while pools and _mean(pools[-1][0]) >= _mean(pool[0]):
            before = pools.pop()
            pool = before[0] + pool[0], before[1] + pool[1]
        pools.append(pool)
    return [_mean(values) for values, count in pools for _ in range(count)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
