"""How fast the engine scores each layer: against plain torch at equal mathematics, the multiply-adds, and the floor.

python benchmarks/speed.py --model resnet56 [--weights FILE] [--batch 64] [--layers "blocks.*.conv1"] [--json FILE]

All of a layer's numbers come from one run, in turns. Networks are folded first, so that all ways see the same one.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from baselines import BASELINES
from common import settings, write_json
from models import MODELS, load, random_images
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import singe
from singe.engine import Engine
from singe.graph.analysis import find_groups
from singe.graph.groups import Group
from singe.graph.layer import is_affine
from singe.graph.suffix import cut
from singe.graph.trace import Env, Trace, evaluate, trace
from singe.report import table

WAYS = ("engine", *BASELINES)


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        layer: its name.
        neurons: how many it has.
        seconds: way -> seconds for one neuron at all nodes.
        macs: way -> multiply-adds for the same.
        floor: seconds of the convolutions and linear layers behind it alone, forward and input gradient.
    """

    layer: str
    neurons: int
    seconds: dict[str, float]
    macs: dict[str, int]
    floor: float

    def ratio(self, way: str) -> float:
        """How many times faster the engine is."""
        return self.seconds[way] / self.seconds["engine"]

    def limit(self, way: str) -> float:
        """How many times fewer multiply-adds it has to do."""
        return self.macs[way] / self.macs["engine"]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    x, y = (part.to(options.device) for part in random_images(options.batch))
    model = singe.fold_batchnorm(load(options.model, options.weights).to(options.device), x[:2]).model
    graph = trace(model, x)
    groups = [g for g in find_groups(graph) if len(g.writers) == 1 and fnmatchcase(g.name, options.layers)]
    rows = [measure(model, graph, group, (x, y), options) for group in groups]
    print(text(rows))
    if options.json:
        write_json(options.json, {"options": settings(options), "rows": [asdict(row) for row in rows]})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file; random weights by default")
    parser.add_argument("--layers", default="*", help="a glob; layers that are coupled to others are left out")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=8, help="of each layer to score")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def measure(
    model: nn.Module, graph: Trace, group: Group, batch: tuple[Tensor, Tensor], options: argparse.Namespace
) -> Row:
    """Every way to score one layer, in turns."""
    quadrature = singe.GaussLegendre(options.nodes)
    neurons = torch.arange(min(options.neurons, group.size))
    criterion = singe.IntegratedGradient(quadrature=quadrature)
    engine = Engine(model, graph, group, batch)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        name: (partial(way, model, batch, group.name, 0, quadrature.dt()), 1) for name, way in BASELINES.items()
    }
    ways["engine"] = (partial(engine.scores, criterion, neurons), len(neurons))
    jobs = min(len(neurons) * options.nodes, engine.chunk)  # that the engine runs at a time
    floor = suffix_layers(model, graph, group, jobs * options.batch)
    ways["floor"] = (lambda: [layer() for layer in floor], jobs)
    times = in_turns({name: way for name, (way, _) in ways.items()}, options.rounds, batch[0].device)
    seconds = {name: times[name] / ways[name][1] for name in ways}
    alone = seconds.pop("floor") * options.nodes
    macs = {name: multiply_adds(*ways[name]) for name in seconds}
    macs["vmap"] = macs["to the layer"]  # the same mathematics; not all of it is counted under vmap
    macs["engine"] += options.nodes * options.batch * row_macs(model, graph, group)
    return Row(group.name, group.size, seconds, macs, alone)


def in_turns(ways: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def multiply_adds(way: Callable[[], object], neurons: int) -> int:
    """Multiply-adds for one neuron as torch counts them: not those of the native operators."""
    counter = FlopCounterMode(display=False)
    with counter:
        way()
    return counter.get_total_flops() // 2 // neurons


def row_macs(model: nn.Module, graph: Trace, group: Group) -> int:
    """Multiply-adds of the gradient of one row for one sample at one node."""
    (call,) = graph.calls(group.writers[0])
    positions = math.prod(graph.shape(call, 1)) // len(model.get_parameter(group.writers[0]))
    return positions * model.get_parameter(group.writers[0])[0].numel()


def suffix_layers(model: nn.Module, graph: Trace, group: Group, samples: int) -> list[Callable[[], None]]:
    """Each convolution and linear layer behind a group, forward and input gradient, on random values of its shapes."""
    live = graph.live(model)
    behind = cut(graph, graph.calls(group.writers[0])).nodes
    return [_both_ways(graph, live, call, samples) for call in behind if is_affine(call)]


def _both_ways(graph: Trace, live: Env, call: fx.Node, samples: int) -> Callable[[], None]:
    source, weight, *others = call.args
    x, delta = (torch.randn(graph.shape(node, samples), device=live[weight].device) for node in (source, call))
    others = [live[o] if isinstance(o, fx.Node) else o for o in others]
    leaf = x.requires_grad_()

    def run() -> None:
        with torch.enable_grad():
            out = evaluate(call, (leaf, live[weight], *others), dict(call.kwargs))
        torch.autograd.grad(out, leaf, delta)

    return run


def text(rows: Sequence[Row]) -> str:
    """Ratios to the engine, with the limit that multiply-adds set, and the engine over the floor."""
    header = ["layer", "ms a neuron", *(f"{way} (limit)" for way in BASELINES), "over the floor"]
    lines = [
        [
            row.layer,
            f"{row.seconds['engine'] * 1e3:.1f}",
            *(f"{row.ratio(way):.1f}x ({row.limit(way):.1f}x)" for way in BASELINES),
            f"{row.seconds['engine'] / row.floor:.2f}x" if row.floor else "-",
        ]
        for row in rows
    ]
    return table(header, [*lines, _total(rows)])


def _total(rows: Sequence[Row]) -> list[str]:
    """All layers, weighted by their neurons."""

    def sums(values: Callable[[Row], dict[str, float] | dict[str, int]]) -> dict[str, float]:
        return {way: sum(values(row)[way] * row.neurons for row in rows) for way in WAYS}

    seconds, macs, floor = sums(lambda r: r.seconds), sums(lambda r: r.macs), sum(r.floor * r.neurons for r in rows)
    ratios = [f"{seconds[way] / seconds['engine']:.1f}x ({macs[way] / macs['engine']:.1f}x)" for way in BASELINES]
    neurons = sum(row.neurons for row in rows)
    return ["all", f"{seconds['engine'] / neurons * 1e3:.1f}", *ratios, f"{seconds['engine'] / floor:.2f}x"]


if __name__ == "__main__":
    main()
