"""What the paper's algorithm would cost if run as written, extrapolated from some of its passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from measuring.timing import call_all, in_turns

import singe
from engine.baselines import backward
from engine.images import Batch
from engine.subject import Subject
from singe.records import GroupRecord
from singe.removal.plan import Plan
from singe.removal.surgery import compact

NODES = len(singe.Geometric(0.95).dt()[0])
LEAST_TIMED = 20
_ONE_NODE = (torch.full((1,), 0.5, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


@dataclass(frozen=True)
class GroupCost:
    """One group of neurons.

    Attributes:
        group: its name.
        passes: how often a neuron fades and the network runs forward and backward.
        whole: median seconds of a pass of the network with nothing cut out, as if removal were a mask.
        smaller: the same with the earlier groups already cut.
    """

    group: str
    passes: int
    whole: float
    smaller: float


@dataclass(frozen=True)
class Literal:
    """The whole algorithm: its groups, and how many passes of either kind were timed."""

    groups: list[GroupCost]
    timed: int

    @property
    def passes(self) -> int:
        return sum(g.passes for g in self.groups)

    @property
    def whole(self) -> float:
        """Seconds with removals as masks only."""
        return sum(g.passes * g.whole for g in self.groups)

    @property
    def smaller(self) -> float:
        """Seconds with every pruned group cut out before the next."""
        return sum(g.passes * g.smaller for g in self.groups)


def count_passes(size: int, removed: int, nodes: int = NODES) -> int:
    """Before every removal, all neurons that are left are scored, at every node."""
    return nodes * sum(size - gone for gone in range(removed))


def extrapolate(subject: Subject, batch: Batch, history: Sequence[GroupRecord]) -> Literal:
    """Times some passes at every group that was pruned, at least :data:`LEAST_TIMED` in all.

    Args:
        subject: its folded network is timed.
        batch: that every pass sees.
        history: which neurons of which groups were removed, in order.
    """
    rounds = math.ceil(LEAST_TIMED / len(history))
    groups = {g.name: g for g in subject.groups}
    costs, gone = [], Plan()
    for record in history:
        smaller = copy.deepcopy(subject.folded)
        compact(smaller, gone.removed())
        networks = {"whole": subject.folded, "smaller": smaller}
        seconds = _pass_seconds(networks, batch, record.group, rounds)
        costs.append(GroupCost(record.group, count_passes(record.size, len(record.removed)), **seconds))
        gone.add(groups[record.group], list(record.removed))
    return Literal(costs, rounds * len(history))


def _pass_seconds(networks: dict[str, torch.nn.Module], batch: Batch, layer: str, rounds: int) -> dict[str, float]:
    """Median seconds of fading a neuron of ``layer``, a forward pass and ``loss.backward()``, after a warm-up."""
    neuron = torch.tensor([0])
    ways = {name: partial(backward, net, batch, layer, neuron, _ONE_NODE) for name, net in networks.items()}
    call_all(ways.values())
    return in_turns(ways, rounds, batch[0].device)
