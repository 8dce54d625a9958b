"""How fast the engine scores each layer: against plain torch at equal mathematics, the multiply-adds, and the floor."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from measuring.common import mebibytes
from measuring.peak import with_peak
from measuring.timing import Way, call_all, in_turns
from torch import Tensor

import singe
from engine.baselines import BASELINES
from engine.floor import multiply_adds, row_macs, suffix_bytes, suffix_layers, suffix_macs
from engine.images import Batch
from engine.subject import Subject
from singe.graph.groups import Group
from singe.quadrature import Nodes
from singe.scoring.engine import Engine
from singe.table import table

WAYS = ("engine", *BASELINES)


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        layer: its name.
        neurons: how many it has.
        jobs: how many the engine runs at a time.
        parts: the number of parts it divides the images into.
        seconds: way -> seconds for one neuron at all nodes.
        macs: way -> multiply-adds for the same.
        floor: seconds of the convolutions and linear layers after it alone, forward and input gradient.
        peak: bytes that an engine takes from its start through its largest pass; None where this is unknown.
    """

    layer: str
    neurons: int
    jobs: int
    parts: int
    seconds: dict[str, float]
    macs: dict[str, float]
    floor: float
    peak: int | None

    def ratio(self, way: str) -> float:
        """How many times faster the engine is."""
        return self.seconds[way] / self.seconds["engine"]

    def limit(self, way: str) -> float:
        """How many times fewer multiply-adds it has to do."""
        return self.macs[way] / self.macs["engine"]

    @property
    def over_floor(self) -> float:
        """How many times the floor it takes."""
        return self.seconds["engine"] / self.floor

    def to_json(self) -> dict[str, Any]:
        figures = {"ratio": self.ratio, "limit": self.limit}
        by_way = {name: {way: figure(way) for way in BASELINES} for name, figure in figures.items()}
        return asdict(self) | by_way | {"over_floor": self.over_floor}


def total(rows: Sequence[Row]) -> Row:
    """All layers as one: the mean of their neurons, and the highest peak."""
    neurons = sum(row.neurons for row in rows)

    def mean(value: Callable[[Row], float]) -> float:
        return sum(value(row) * row.neurons for row in rows) / neurons

    return Row(
        layer="all", neurons=neurons, jobs=max(row.jobs for row in rows), parts=max(row.parts for row in rows),
        seconds={way: mean(lambda row, way=way: row.seconds[way]) for way in WAYS},
        macs={way: mean(lambda row, way=way: row.macs[way]) for way in WAYS},
        floor=mean(lambda row: row.floor), peak=max((row.peak for row in rows if row.peak is not None), default=None),
    )  # fmt: skip


@dataclass(frozen=True)
class Layers:
    """The report on all layers."""

    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        return {"rows": [row.to_json() for row in self.rows], "all": total(self.rows).to_json()}

    def __str__(self) -> str:
        header = ["layer", "ms a neuron", *(f"{way} (limit)" for way in BASELINES), "over the floor", "peak MiB"]
        lines = [
            [
                row.layer,
                f"{row.seconds['engine'] * 1e3:.1f}",
                *(f"{row.ratio(way):.1f}x ({row.limit(way):.1f}x)" for way in BASELINES),
                f"{row.over_floor:.2f}x",
                mebibytes(row.peak),
            ]
            for row in (*self.rows, total(self.rows))
        ]
        return table(header, lines)


def measure(subject: Subject, options: Namespace) -> Layers:
    """Every layer that ``options.layers`` matches."""
    (batch,) = subject.batches(1)
    return Layers([_measure(subject, group, batch, options) for group in subject.matching(options.layers)])


def _measure(subject: Subject, group: Group, batch: Batch, options: Namespace) -> Row:
    """Every way to score one layer, in turns."""
    quadrature = singe.GaussLegendre(options.nodes[0])
    criterion, nodes = singe.IntegratedGradient(quadrature=quadrature), quadrature.dt()
    neurons = torch.arange(min(options.neurons, group.size))
    start = partial(_start, subject, group, batch, criterion, len(neurons), options.memory)
    engine, peak = with_peak(start, subject.device)
    ways = _baselines(subject, group, batch, neurons, nodes, options.memory)
    ways["engine"] = partial(engine.scores, criterion, neurons), len(neurons)

    macs = {name: multiply_adds(way) / count for name, (way, count) in ways.items()}  # warms up, too
    images = len(nodes[0]) * subject.size
    # vmap's count is incomplete: the layer and its gradient for every job, and both ways through the layers after it
    macs["vmap"] = 2 * images * (group.size * row_macs(subject, group) + suffix_macs(subject, group))
    macs["engine"] += images * row_macs(subject, group)

    jobs = min(len(neurons) * len(nodes[0]), engine.chunk)
    alone = suffix_layers(subject, group, math.ceil(jobs * subject.size / engine.parts))
    call_all(alone)
    ways["floor"] = partial(call_all, alone), jobs / engine.parts / len(nodes[0])
    times = in_turns({name: way for name, (way, _) in ways.items()}, options.rounds, subject.device)
    seconds = {name: times[name] / ways[name][1] for name in times}
    floor = seconds.pop("floor")
    return Row(group.name, group.size, engine.chunk, engine.parts, seconds, macs, floor, peak)


def _baselines(
    subject: Subject, group: Group, batch: Batch, neurons: Tensor, nodes: Nodes, memory: int
) -> dict[str, tuple[Way, float]]:
    """The baselines, and how many neurons each scores: one, or under vmap as many as memory allows."""
    ways: dict[str, tuple[Way, float]] = {}
    for name, way in BASELINES.items():
        own = neurons if name == "vmap" else neurons[:1]
        ways[name] = partial(way, subject.folded, batch, group.name, own, nodes), len(own)
    stacked = max(1, memory // suffix_bytes(subject, group))
    way, count = ways["vmap"]
    ways["vmap"] = partial(way, at_once=stacked), count
    return ways


def _start(
    subject: Subject, group: Group, batch: Batch, criterion: singe.IntegratedGradient, least: int, memory: int
) -> Engine:
    """An engine with its caches filled: it has scored ``least`` neurons, or more if a pass takes more."""
    engine = Engine(subject.folded, subject.graph, group, batch, memory=memory)
    filling = math.ceil(engine.chunk / len(criterion.rule().nodes[0]))
    engine.scores(criterion, torch.arange(min(group.size, max(least, filling))))
    return engine
