"""Lazy re-scoring against scoring every neuron again after each removal."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from measuring.timing import timed
from torch import nn
from torch.nn import functional as F

import singe
from engine.images import Batch
from engine.subject import Subject
from singe.graph.groups import Group
from singe.removal.surgery import mask
from singe.scoring import selection
from singe.scoring.engine import Engine
from singe.scoring.selection import Selection

CRITERION = singe.IntegratedGradient(quadrature=singe.GaussLegendre(4))


@dataclass(frozen=True)
class Outcome:
    """The outcome of removing half of a layer in one of the two ways.

    Attributes:
        kept: the neurons that are left.
        scored: how many were scored, repetitions included.
        seconds: in total.
        loss: on the batch that neurons were scored on.
        loss_elsewhere: on other images.
    """

    kept: list[int]
    scored: int
    seconds: float
    loss: float
    loss_elsewhere: float


@dataclass(frozen=True)
class Refresh:
    """Both ways on one layer and one batch; the losses before are those of the unpruned network."""

    layer: str
    batch: int
    removed: int
    in_common: float
    loss_before: float
    loss_elsewhere_before: float
    lazy: Outcome
    full: Outcome


def compare(subject: Subject, group: Group, number: int, batch: Batch, elsewhere: Batch, memory: int) -> Refresh:
    """Removes half of a group twice, from the same network on the same batch."""
    lazy, full = (_remove_half(subject, group, batch, elsewhere, memory, way) for way in ("lazy", "full"))
    return Refresh(
        layer=group.name, batch=number, removed=group.size // 2,
        in_common=len(set(lazy.kept) & set(full.kept)) / len(full.kept),
        loss_before=_loss(subject.folded, batch), loss_elsewhere_before=_loss(subject.folded, elsewhere),
        lazy=lazy, full=full,
    )  # fmt: skip


def _remove_half(
    subject: Subject, group: Group, batch: Batch, elsewhere: Batch, memory: int, refresh: selection.Refresh
) -> Outcome:
    """As ``singe.prune`` does: the least relevant neuron is masked, and the engine updated."""
    work = copy.deepcopy(subject.folded)

    def run() -> Selection:
        chosen = Selection(Engine(work, subject.graph, group, batch, memory=memory), CRITERION, refresh)
        for _ in range(group.size // 2):
            neuron = chosen.take_least()
            mask(work, group.slices, torch.tensor([neuron]))
            chosen.scorer.forget(neuron)
        return chosen

    chosen, seconds = timed(run, subject.device)
    kept = sorted(set(range(group.size)) - set(chosen.taken))
    return Outcome(kept, chosen.scored, seconds, _loss(work, batch), _loss(work, elsewhere))


@torch.no_grad()
def _loss(model: nn.Module, batch: Batch) -> float:
    return float(F.cross_entropy(model(batch[0]), batch[1]))
