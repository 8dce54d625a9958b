"""What fading does to gradients: their norm along the path of each neuron of a layer, from as it is to nothing.

A gradient-based criterion knows the right end of each line, a magnitude nothing of it; the integrated gradient sums
over the line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring.common import machine
from zoo_table import markdown

import singe
from paper.methods import NODES
from paper.recipe import SCORING, Baseline, Stopwatch
from paper.records import Record, Records
from paper.size import Size

CPU = FULL = Size()
LAYERS = ("blocks.13.conv1", "blocks.25.conv1")
POINTS, IMAGES = 20, 64
SHOWN = 3
"""Of each kind of neuron."""


@dataclass(frozen=True)
class At:
    """A quadrature of a single node, so that a summed gradient is the gradient's norm there."""

    t: float

    def dt(self) -> singe.quadrature.Nodes:
        return self.log_dt()

    def log_dt(self) -> singe.quadrature.Nodes:
        return torch.tensor([self.t], dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    """A record for each layer: the gradient's norm of every neuron at each point, and what criteria make of them."""
    for layer in options.layers or LAYERS:
        settings = {
            "model": baseline.name, "weights": baseline.checksums["weights"][:12], "layer": layer, "images": IMAGES,
            "points": POINTS, "seed": options.seeds[0],
        }  # fmt: skip
        if records.find(settings):
            continue
        batch, watch = baseline.batches(options.seeds[0], SCORING).take(IMAGES), Stopwatch()

        def scores(criterion: singe.criteria.Criterion, layer: str = layer, batch: tuple = batch) -> list[float]:
            values = singe.score(baseline.model, batch, layer, criterion=criterion).tolist()
            return [float(f"{value:.5g}") for value in values]

        t = [(i + 1) / POINTS for i in range(POINTS)]
        found = {
            "t": t,
            "norms": [scores(singe.SummedGradient(quadrature=At(point))) for point in t],
            "magnitude": scores(singe.Magnitude()),
            "integrated_gradient": scores(singe.IntegratedGradient(quadrature=NODES)),
        }
        records.add(settings, found | {"seconds": watch.seconds, "machine": machine(), "checksums": baseline.checksums})


def page(records: Sequence[Record]) -> str:
    """How far the gradient at the start is from that on the way."""
    lines = []
    for record in records:
        norms = torch.tensor(record["norms"], dtype=torch.float64)  # [points, neurons]
        rise = norms.amax(0) / norms[-1].clamp(min=1e-30)
        lines.append([
            record["settings"]["layer"], f"{len(rise)}", f"{float((rise > 2).double().mean()):.0%}",
            f"{float(rise.median()):.2f}", f"{float((norms.argmax(0) == len(norms) - 1).double().mean()):.0%}",
        ])  # fmt: skip
    header = ["layer", "neurons", "gradient more than doubles", "median of largest / first", "largest at the start"]
    return markdown(header, lines)


def plot(records: Sequence[Record], path: Path) -> None:
    """A panel for each layer; the neurons that rise most, and those of the least integrated gradient and magnitude."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(records), 4), layout="constrained")
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        norms = torch.tensor(record["norms"], dtype=torch.float64)
        axes.plot(record["t"], norms, color="0.85", linewidth=0.7)
        for label, colour, of in _kinds(record, norms):
            for number, neuron in enumerate(of.argsort()[:SHOWN].tolist()):
                axes.plot(record["t"], norms[:, neuron], color=colour, label=None if number else label)
        axes.set(title=record["settings"]["layer"], xlabel="t, from removed to as it is", ylabel="norm of the gradient")
        axes.set(xlim=(0, 1), yscale="log")
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _kinds(record: Record, norms: torch.Tensor) -> list[tuple[str, str, torch.Tensor]]:
    """(name, colour, value by which neurons are of that kind, the least first)."""
    return [
        ("rise most", "tab:red", norms[-1] / norms.amax(0).clamp(min=1e-30)),
        ("least magnitude", "tab:orange", torch.tensor(record["magnitude"])),
        ("least integrated gradient", "tab:blue", torch.tensor(record["integrated_gradient"])),
    ]
