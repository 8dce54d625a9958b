"""From rho, the share of the parameters that must go, to a number of neurons per group."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import nn

from .graph.groups import Group


class ParameterCount:
    """How many parameters are left when each group has lost some neurons; exact, tied parameters counted once.

    Args:
        model: the unpruned model.
        groups: the groups that may lose neurons.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        canonical = {id(p): name for name, p in model.named_parameters()}
        names = {alias: canonical[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # parameter -> axis -> (group, indices that go with one neuron)
        self._owned: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for i, group in enumerate(groups):
            for s in group.slices:
                if s.tensor in names:
                    self._owned[names[s.tensor]][s.dim].append((i, s.multiplicity))
        self.total = sum(math.prod(shape) for shape in self._shapes.values())

    def gone(self, removed: Sequence[int]) -> int:
        """Parameters gone when group i has lost removed[i] neurons."""
        return sum(self._loss(name, removed) for name in self._owned)

    def unit(self, removed: Sequence[int], group: int) -> int:
        """Parameters that one more neuron of a group takes with it."""
        more = list(removed)
        more[group] += 1
        return self.gone(more) - self.gone(removed)

    def _loss(self, name: str, removed: Sequence[int]) -> int:
        left = [
            size - sum(removed[i] * n for i, n in self._owned[name].get(dim, ()))
            for dim, size in enumerate(self._shapes[name])
        ]
        return math.prod(self._shapes[name]) - math.prod(left)


Allocation = Callable[[ParameterCount, Sequence[int], float], list[int]]
"""(count, size of each group, rho) -> neurons to remove from each group."""


def uniform(count: ParameterCount, sizes: Sequence[int], rho: float) -> list[int]:
    """The same share of neurons in every group, then single neurons more or less to meet rho.

    Args:
        count: of the groups.
        sizes: neurons of each group; at least one of them stays.
        rho: share of all parameters that must go, in (0, 1).

    Returns:
        neurons to remove from each group; within one smallest neuron of rho.

    Raises:
        ValueError: rho is out of reach; says how far it goes.
    """
    target = rho * count.total
    reach = count.gone([n - 1 for n in sizes])
    if target > reach:
        limit = math.floor(reach / count.total * 1e4) / 1e4
        raise ValueError(f"expected rho <= {limit:.4f}, which leaves one neuron in every prunable group, got {rho}")

    def at(rate: float) -> list[int]:
        return [min(int(rate * n), n - 1) for n in sizes]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if count.gone(at(middle)) <= target else (low, middle)
    return _adjust(count, sizes, at(low), target)


def _adjust(count: ParameterCount, sizes: Sequence[int], removed: list[int], target: float) -> list[int]:
    """Takes or spares one neuron per group, from the dearest to the cheapest, again and again while it helps."""
    missing, changed = target - count.gone(removed), True
    while changed:
        changed = False
        for i in sorted(range(len(sizes)), key=lambda i: -count.unit(removed, i)):
            trial = list(removed)
            trial[i] += 1 if missing > 0 else -1
            if 0 <= trial[i] < sizes[i] and abs(target - count.gone(trial)) < abs(missing):
                removed, missing, changed = trial, target - count.gone(trial), True
    return removed


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform}
