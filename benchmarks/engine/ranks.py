"""Whether shortcuts rank neurons as the exact score does: fewer nodes, lower precision, lazy re-scoring."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from measuring.common import spearman
from measuring.timing import timed
from torch import Tensor

import singe
from engine.images import Batch
from engine.refresh import Refresh, compare
from engine.subject import Subject
from singe.graph.groups import Group
from singe.models.precision import Precision
from singe.quadrature import Quadrature
from singe.scoring.engine import Engine
from singe.table import table

EXACT = singe.Geometric(0.95)


@dataclass(frozen=True)
class Agreement:
    """One shortcut on one layer, beside the exact score.

    Attributes:
        layer: its name.
        shortcut: how it was scored.
        spearman: rank correlation of the scores.
        same_least: whether the least relevant neuron is the same.
        same_half: share of the lower half that is in the exact score's lower half.
        seconds, seconds_exact: to score all neurons.
    """

    layer: str
    shortcut: str
    spearman: float
    same_least: bool
    same_half: float
    seconds: float
    seconds_exact: float


@dataclass(frozen=True)
class Ranks:
    """The report: shortcuts of a score, and of re-scoring."""

    shortcuts: list[Agreement]
    refreshes: list[Refresh]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{_shortcuts(self.shortcuts)}\n\n{_refreshes(self.refreshes)}"


def _shortcuts(agreements: Sequence[Agreement]) -> str:
    header = ["layer", "against Geometric(0.95)", "Spearman", "same least", "same lower half", "faster"]
    lines = [
        [
            a.layer,
            a.shortcut,
            f"{a.spearman:.4f}",
            "yes" if a.same_least else "no",
            f"{a.same_half:.0%}",
            f"{a.seconds_exact / a.seconds:.1f}x",
        ]
        for a in agreements
    ]
    return table(header, lines)


def _refreshes(refreshes: Sequence[Refresh]) -> str:
    header = ["layer", "batch", "removed", "kept in common", "loss full / lazy", "other images", "scored full / lazy"]
    lines = [
        [
            r.layer,
            str(r.batch),
            str(r.removed),
            f"{r.in_common:.0%}",
            f"{r.full.loss:.3f} / {r.lazy.loss:.3f}",
            f"{r.full.loss_elsewhere:.3f} / {r.lazy.loss_elsewhere:.3f}",
            f"{r.full.scored} / {r.lazy.scored}",
        ]
        for r in refreshes
    ]
    return table(header, lines)


def measure(subject: Subject, options: Namespace) -> Ranks:
    """The layers that ``options.rank_layers`` names, or three of them; every layer on the same batches."""
    names = options.rank_layers or spread([g.name for g in subject.groups])
    groups = [group for name in names for group in subject.matching(name)]
    *drawn, elsewhere = subject.batches(options.rank_batches + 1)
    agreements = [a for group in groups for a in _agreements(subject, group, drawn[0], options.memory)]
    refreshes = [
        compare(subject, group, i, batch, elsewhere, options.memory)
        for group in groups for i, batch in enumerate(drawn)
    ]  # fmt: skip
    return Ranks(agreements, refreshes)


def spread(names: Sequence[str]) -> list[str]:
    """Three over the depth of a network: one in each stage of a ResNet-56."""
    return list(dict.fromkeys(names[len(names) * k // 24] for k in (1, 11, 22)))


def agreement(scores: Tensor, exact: Tensor) -> dict[str, Any]:
    """How two scores of the same neurons rank them; see :class:`Agreement`."""
    half = max(1, len(exact) // 2)
    lower, expected = (set(v.argsort()[:half].tolist()) for v in (scores, exact))
    return {
        "spearman": spearman(scores, exact),
        "same_least": bool(scores.argmin() == exact.argmin()),
        "same_half": len(lower & expected) / half,
    }


def _agreements(subject: Subject, group: Group, batch: Batch, memory: int) -> list[Agreement]:
    score = partial(_score, subject, group, batch, memory)
    exact, seconds_exact = score(EXACT, "float32")
    found = []
    for name, (quadrature, precision) in shortcuts(subject.device).items():
        scores, seconds = score(quadrature, precision)
        found.append(
            Agreement(group.name, name, **agreement(scores, exact), seconds=seconds, seconds_exact=seconds_exact)
        )
    return found


def shortcuts(device: torch.device) -> dict[str, tuple[Quadrature, Precision]]:
    """Every shortcut that a device offers."""
    lower: list[Precision] = ["bfloat16", *(["tf32"] if device.type == "cuda" else [])]
    found: dict[str, tuple[Quadrature, Precision]] = {
        f"{nodes} nodes": (singe.GaussLegendre(nodes), "float32") for nodes in (4, 2)
    }
    return found | {f"4 nodes, {precision}": (singe.GaussLegendre(4), precision) for precision in lower}


def _score(
    subject: Subject, group: Group, batch: Batch, memory: int, quadrature: Quadrature, precision: Precision
) -> tuple[Tensor, float]:
    """Every neuron's score, and how many seconds it takes once warm."""
    criterion = singe.IntegratedGradient(quadrature=quadrature)
    engine = Engine(subject.folded, subject.graph, group, batch, memory=memory, precision=precision)
    engine.scores(criterion, torch.tensor([0]))
    return timed(partial(engine.scores, criterion), subject.device)
