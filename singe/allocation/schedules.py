"""Allocations: which parts lose more than others. Parts are groups, which lose neurons, or weight tensors.

An allocation orders removals: its schedule says how many units every part has lost at a level in [0, 1]: none at 0,
all that the allocation ever takes at 1, and never fewer at a higher level. ``fit`` finds the level that meets rho.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import values
from ..graph.groups import module_of
from .cost import Cost
from .parts import Part, named_parts

Schedule = Callable[[float], Sequence[float]]
"""Level in [0, 1] -> how many units each part has lost."""

RATES = ("uniform", "linear", "block")

RANKINGS = ("global", "sensitivity")


def check(allocation: Any) -> None:
    """Raises TypeError or ValueError unless ``allocation`` is a valid one."""
    if isinstance(allocation, str):
        names = (*RATES, *RANKINGS)
        if allocation not in names:
            raise ValueError(f"expected allocation among {', '.join(names)}, or a mapping, got {allocation!r}")
    elif isinstance(allocation, Mapping):
        for pattern, rate in allocation.items():
            if not isinstance(pattern, str):
                raise TypeError(f"expected module names as keys of allocation, got {pattern!r}")
            if not 0 <= values.number(f"allocation[{pattern!r}]", rate) < math.inf:
                raise ValueError(f"expected rates >= 0 in allocation, got {rate} for {pattern!r}")
    else:
        raise TypeError(f"expected allocation to be a name or a mapping, got {type(allocation).__name__}")


def rates(allocation: str | Mapping[str, float], model: nn.Module, parts: Sequence[Part]) -> list[float]:
    """The share of units that each part loses, relative to other parts.

    Args:
        allocation: "uniform": the same everywhere; "linear": rising with depth, from 1/n in the first of n parts to 1
            in the last; "block": likewise from block to block, the same within one, where a block is the innermost
            module around a part's first layer whose class the model repeats; or a mapping from module names or globs
            to relative rates, 1 for what none names, where later entries override earlier ones.
        model: of the parts.
        parts: in execution order.

    Raises:
        ValueError: a pattern that names no module.
    """
    if isinstance(allocation, Mapping):
        by_name = dict.fromkeys((p.name for p in parts), 1.0)
        for pattern, rate in allocation.items():
            by_name |= dict.fromkeys(named_parts(model, parts, pattern, "allocation"), float(rate))
        return [by_name[p.name] for p in parts]
    if allocation == "uniform":
        return [1.0] * len(parts)
    steps = range(len(parts)) if allocation == "linear" else _blocks(model, parts)
    return [(step + 1) / (max(steps) + 1) for step in steps]


def proportional(rate: Sequence[float], sizes: Sequence[int]) -> Schedule:
    """Every part loses units in proportion to its rate until it has none left to lose."""
    least = min((r for r in rate if r > 0), default=1.0)
    return lambda level: [min(1.0, level * r / least) * n for r, n in zip(rate, sizes, strict=True)]


def ranked(scores: Sequence[Tensor], cost: Cost) -> Schedule:
    """All units in one ranking by score per parameter (or multiply-add) that they save, the least first.

    Args:
        scores: [n] for every part: the effect of losing each unit, in any measure.
        cost: of the same parts.
    """
    none = [0] * len(scores)
    value = torch.cat([s / max(1, cost.unit(none, i)) for i, s in enumerate(scores)])
    group = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])[value.argsort(stable=True)]
    return lambda level: torch.bincount(group[: round(level * len(group))], minlength=len(scores)).tolist()


def _blocks(model: nn.Module, parts: Sequence[Part]) -> list[int]:
    """The index of each part's block, in order of appearance."""
    classes = Counter(type(m) for m in model.modules())
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

    def block(name: str) -> str:
        parent = module_of(name)
        while parent:
            module = model.get_submodule(parent)
            if classes[type(module)] > 1 and not isinstance(module, containers):
                return parent
            parent = module_of(parent)
        return name

    names = [block(module_of(p.writers[0])) for p in parts]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [order[name] for name in names]
