"""How the engine's time grows with neurons, nodes, images and the layers after a layer: a straight line through each.

python benchmarks/growth.py --model resnet56 [--layer blocks.12.conv1] [--plot growth.svg] [--json FILE]

One quantity varies at a time, the others stay at --neurons, --nodes, --batch and --layer. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from engine.floor import suffix_macs
from engine.subject import Subject, prepare
from measuring.common import settings, write_json
from measuring.timing import Way, call_all, in_turns
from models import MODELS

import singe
from singe.graph.groups import Group
from singe.models.batches import head
from singe.scoring.engine import Engine
from singe.table import table


@dataclass(frozen=True)
class Curve:
    """Seconds against one quantity, with the straight line of least squares through them.

    Attributes:
        quantity: what varies.
        x: its values.
        seconds: measured.
        slope, intercept: of the line.
        r2: share of the variance that the line explains.
        exponent: slope of the line through the logarithms; 1 where time grows in proportion.
    """

    quantity: str
    x: list[float]
    seconds: list[float]
    slope: float
    intercept: float
    r2: float
    exponent: float


def fitted(quantity: str, seconds: dict[int, float]) -> Curve:
    """The curve through measured points: value -> seconds, at least two."""
    x, y = (np.array(list(v), dtype=float) for v in (seconds, seconds.values()))
    slope, intercept = np.polyfit(x, y, 1)
    r2 = 1 - np.sum((y - slope * x - intercept) ** 2) / np.sum((y - y.mean()) ** 2)
    exponent = np.polyfit(np.log(x), np.log(y), 1)[0]
    return Curve(quantity, x.tolist(), y.tolist(), float(slope), float(intercept), float(r2), float(exponent))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    curves = measure(prepare(options), options)
    print(text(curves))
    if options.json:
        write_json(options.json, {"options": settings(options), "curves": [asdict(curve) for curve in curves]})
    if options.plot:
        plot(curves, options.plot)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file; random weights by default")
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10; noise by default")
    parser.add_argument("--layer", help="default: the one in the middle")
    parser.add_argument("--neurons", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="images")
    parser.add_argument("--points", type=int, default=5, help="of each curve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="an SVG or PNG file")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def measure(subject: Subject, options: argparse.Namespace) -> list[Curve]:
    """One curve for each quantity."""
    chosen = subject.matching(options.layer)[0] if options.layer else subject.groups[len(subject.groups) // 2]
    (batch,) = subject.batches(1)

    @cache
    def engine(group: Group, images: int) -> Engine:
        return Engine(subject.folded, subject.graph, group, head(batch, images))

    def way(
        group: Group = chosen, neurons: int = options.neurons, nodes: int = options.nodes, images: int = options.batch
    ) -> Way:
        criterion = singe.IntegratedGradient(quadrature=singe.GaussLegendre(nodes))
        return partial(engine(group, images).scores, criterion, torch.arange(min(neurons, group.size)))

    points = options.points
    layers = [subject.groups[i * (len(subject.groups) - 1) // (points - 1)] for i in reversed(range(points))]
    curves = {
        "neurons": {n: way(neurons=n) for n in doublings(chosen.size, points)},
        "nodes": {n: way(nodes=n) for n in doublings(4 * options.nodes, points)},
        "images": {n: way(images=n) for n in doublings(options.batch, points)},
        "multiply-adds behind the layer": {suffix_macs(subject, group): way(group) for group in layers},
    }
    return [fitted(quantity, _seconds(ways, options.rounds, subject)) for quantity, ways in curves.items()]


def doublings(largest: int, points: int) -> list[int]:
    """Numbers up to ``largest``, each about twice the one before; fewer where they would fall below 1."""
    return [largest >> k for k in reversed(range(points)) if largest >> k]


def _seconds(ways: dict[int, Way], rounds: int, subject: Subject) -> dict[int, float]:
    call_all(ways.values())
    return in_turns(ways, rounds, subject.device)


def text(curves: Sequence[Curve]) -> str:
    """Slopes and how straight the lines are."""
    header = ["quantity", "from", "to", "seconds from", "to", "R2", "exponent"]
    lines = [
        [
            c.quantity,
            f"{c.x[0]:,.0f}",
            f"{c.x[-1]:,.0f}",
            f"{c.seconds[0]:.3f}",
            f"{c.seconds[-1]:.3f}",
            f"{c.r2:.4f}",
            f"{c.exponent:.2f}",
        ]
        for c in curves
    ]
    return table(header, lines)


def plot(curves: Sequence[Curve], path: Path) -> None:
    """A panel for each curve: the measured points and their line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(curves), 3.5), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves)), curves, strict=True):
        ends = np.array([0, max(curve.x)])
        axes.plot(ends, curve.intercept + curve.slope * ends, color="0.7")
        axes.plot(curve.x, curve.seconds, "o")
        axes.set(xlabel=curve.quantity, ylabel="seconds", title=f"R² {curve.r2:.4f}, exponent {curve.exponent:.2f}")
        axes.set(xlim=(0, None), ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
