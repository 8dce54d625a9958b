"""Which neurons of all groups are masked in one round of pruning while training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..graph.groups import Group


def channels(group: Group) -> int:
    """How many output channels of layers each neuron of a group owns."""
    return sum(group.written(weight).multiplicity for weight in group.writers)


def comparable(scores: Tensor, masked: Sequence[int]) -> Tensor:
    """A group's scores divided by their L2 norm; infinite for neurons that are already masked."""
    scores = scores.clone()
    scores[list(masked)] = 0
    scores = scores / (scores.norm() or 1.0)
    scores[list(masked)] = math.inf
    return scores


def least(groups: Mapping[str, Group], ranked: Mapping[str, Tensor], room: int) -> dict[str, list[int]]:
    """The least relevant neurons of all groups, by group; the last of a group stays.

    Args:
        groups: by name.
        ranked: likewise, comparable scores.
        room: the most channels to mask.
    """
    taken = dict[str, list[int]]()
    left = {name: int(scores.isfinite().sum()) for name, scores in ranked.items()}
    names = list(ranked)
    order = sorted((v, i, n) for i, s in enumerate(ranked.values()) for n, v in enumerate(s.tolist()) if v < math.inf)
    for _, i, neuron in order:
        name, cost = names[i], channels(groups[names[i]])
        if cost <= room and left[name] > 1:
            taken.setdefault(name, []).append(neuron)
            left[name], room = left[name] - 1, room - cost
    return taken
