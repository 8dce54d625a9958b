"""How much faster networks get when parameters (or other costs) are removed, and whether rounded widths pay off.

python benchmarks/latency.py [--models resnet56 mobilenet_v2] [--rho .5 .75] [--round-to 1 8] [--json FILE]

Networks are cut to the widths that ``singe.prune`` fits to rho with a uniform allocation; which neurons are removed
does not affect time, so none is scored. The unpruned network and those cut from it run in turns in one process, so
that other work on the machine slows all of them. Besides wall-clock time, CPU time is given: for one thread, about what
a pass takes if nothing else runs. Weights are random.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring.common import settings, write_json
from models import MODELS, load, random_images
from torch import Tensor, nn

import singe
from singe.allocation.cost import mac_cost, parameter_cost
from singe.allocation.goal import Goal
from singe.graph.analysis import analyse
from singe.graph.groups import Group
from singe.graph.trace import Trace, trace
from singe.sizes import count_macs
from singe.table import table
from singe.timing.latency import evaluating, in_turns


@dataclass(frozen=True)
class Analysed:
    """An unpruned network, its graph, and a function that counts a network's multiply-adds for one sample."""

    model: nn.Module
    graph: Trace
    macs_of: Callable[[nn.Module], int]

    def groups(self, goal: Goal) -> list[Group]:
        """The groups that may lose neurons."""
        groups, _ = analyse(self.graph)
        whole = goal.left_whole(self.model, groups)
        return [group for group in groups if group.name not in whole]


@dataclass(frozen=True)
class Pruned:
    """One network without some of its neurons.

    Attributes:
        target: what rho is a share of.
        rho: the share.
        round_to: layers keep a multiple of this many neurons.
        params_removed, macs_removed: the shares that are gone.
        model: the pruned network.
    """

    target: str
    rho: float
    round_to: int
    params_removed: float
    macs_removed: float
    model: nn.Module

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "model"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    result: dict[str, Any] = {"options": settings(options), "networks": {}}
    for name in options.models:
        torch.manual_seed(0)
        model, x = load(name), random_images(2, name)[0]
        network = Analysed(model, trace(model, x), partial(count_macs, inputs=x))
        goals = [
            Goal(rho, target, "uniform", round_to, ())
            for target in options.targets for rho in options.rho for round_to in options.round_to
        ]  # fmt: skip
        pruned = [pruned_to(goal, network) for goal in goals]
        batches = {batch: measure(name, model, pruned, batch, options) for batch in options.batches}
        result["networks"][name] = {
            "pruned": [p.to_json() for p in pruned],
            "batches": {str(batch): found for batch, found in batches.items()},
        }
        print(f"{text(name, pruned, batches)}\n", flush=True)
        if options.json:
            write_json(options.json, result)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["resnet56", "mobilenet_v2"])
    parser.add_argument("--targets", nargs="+", choices=["params", "macs"], default=["params"])
    parser.add_argument("--rho", nargs="+", type=float, default=[0.5, 0.75])
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="images at a time")
    parser.add_argument("--rounds", type=int, default=30, help="how often every network is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def pruned_to(goal: Goal, network: Analysed) -> Pruned:
    """A copy of the widths that meet a goal."""
    groups = network.groups(goal)
    params = parameter_cost(network.model, groups)
    macs = mac_cost(network.model, groups, network.graph, network.macs_of)
    counts = goal.counts(network.model, groups, network.graph, network.macs_of, list, {})
    plan = singe.Plan.of(zip(groups, map(range, counts), strict=True))
    shares = [cost.gone(counts) / cost.total for cost in (params, macs)]
    return Pruned(goal.target, goal.rho, goal.round_to, *shares, plan.apply(copy.deepcopy(network.model)))


def measure(
    name: str, model: nn.Module, pruned: Sequence[Pruned], batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the unpruned network and of the others, and how many times faster each of these is."""
    models = [m.to(options.device) for m in (model, *(p.model for p in pruned))]
    x = random_images(batch, name)[0].to(options.device)
    load_before = os.getloadavg()[0]
    seconds = singe.latencies(models, x, rounds=options.rounds)
    with evaluating(models), torch.no_grad():
        busy = in_turns([partial(cpu_seconds, m, x) for m in models], options.rounds)
    return {
        "load": [load_before, os.getloadavg()[0]],
        "unpruned": asdict(seconds[0]),
        "pruned": [asdict(found) for found in seconds[1:]],
        "speedup": [seconds[0].median / found.median for found in seconds[1:]],
        "cpu_seconds": [asdict(found) for found in busy],
        "speedup_of_cpu_seconds": [busy[0].median / found.median for found in busy[1:]],
    }


def cpu_seconds(model: nn.Module, x: Tensor) -> float:
    """CPU time of the process during a forward pass."""
    start = time.process_time()
    model(x)
    return time.process_time() - start


def text(name: str, pruned: Sequence[Pruned], batches: dict[int, dict[str, Any]]) -> str:
    """A row for each pruned network; for each batch, times faster by the clock and in seconds of a CPU."""
    header = ["target", "rho", "round_to", "parameters", "multiply-adds", *(f"batch of {batch}" for batch in batches)]
    rows = []
    for i, p in enumerate(pruned):
        faster = [f"{b['speedup'][i]:.2f}x ({b['speedup_of_cpu_seconds'][i]:.2f}x)" for b in batches.values()]
        rows.append(
            [p.target, f"{p.rho:g}", str(p.round_to), f"-{p.params_removed:.1%}", f"-{p.macs_removed:.1%}", *faster]
        )
    unpruned = ", ".join(f"{1e3 * b['unpruned']['median']:.3g} ms for {batch}" for batch, b in batches.items())
    return f"{name}: {unpruned}\n{table(header, rows)}"


if __name__ == "__main__":
    main()
