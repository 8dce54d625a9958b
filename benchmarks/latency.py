"""How much faster networks get when parameters (or other costs) go, and whether rounded widths earn their place.

python benchmarks/latency.py [--models resnet56 mobilenet_v2] [--rho .5 .75] [--round-to 1 8] [--json FILE]

Networks are pruned by magnitude, without fine-tuning: which neurons go makes no difference to time. The unpruned one
and all that came of it run in turns in one process, so that other work on the machine slows them all down. Beside the
times of whole passes stand sums of the medians of all modules: on a busy machine these are steadier, as an interruption
falls into one module; but they hold the microseconds that it takes to look at the clock. Weights are random.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import settings, write_json
from models import MODELS, load, random_images
from torch import nn

import singe
from singe.module_times import module_times
from singe.report import table
from singe.task import Task


@dataclass(frozen=True)
class Pruned:
    """One network without some of its neurons.

    Attributes:
        target: what went a share of.
        rho: the share.
        round_to: layers keep a multiple of so many neurons.
        params_removed, macs_removed: the shares that are gone.
        model: what is left.
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
        model = load(name).to(options.device)
        pruned = [
            prune(name, model, target, rho, round_to, options)
            for target in options.targets for rho in options.rho for round_to in options.round_to
        ]  # fmt: skip
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
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="images at a time")
    parser.add_argument("--rounds", type=int, default=30, help="how often every network is timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def prune(name: str, model: nn.Module, target: str, rho: float, round_to: int, options: argparse.Namespace) -> Pruned:
    """What ``singe.prune`` leaves."""
    loader = [tuple(part.to(options.device) for part in random_images(4, name))]
    result = singe.prune(
        model, loader, rho, target=target, round_to=round_to, criterion="magnitude", finetune=None, images=4,
        progress=False,
    )  # fmt: skip
    return Pruned(target, rho, round_to, result.params_removed, result.macs_removed, result.model)


def measure(
    name: str, model: nn.Module, pruned: Sequence[Pruned], batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of the unpruned network and of the others, and how many times faster each of these is."""
    models = [model, *(p.model for p in pruned)]
    x, y = (part.to(options.device) for part in random_images(batch, name))
    load_before = os.getloadavg()[0]
    seconds = singe.latencies(models, x, rounds=options.rounds)
    modules = [sum(found.values()) for found in module_times(models, (x, y), Task(), options.rounds)]
    return {
        "load": [load_before, os.getloadavg()[0]],
        "unpruned": asdict(seconds[0]),
        "pruned": [asdict(found) for found in seconds[1:]],
        "speedup": [seconds[0].median / found.median for found in seconds[1:]],
        "modules": modules,
        "speedup_of_modules": [modules[0] / found for found in modules[1:]],
    }


def text(name: str, pruned: Sequence[Pruned], batches: dict[int, dict[str, Any]]) -> str:
    """A row for each pruned network; for each batch, times faster as a whole and by the sum of its modules."""
    header = ["target", "rho", "round_to", "parameters", "multiply-adds", *(f"batch of {batch}" for batch in batches)]
    rows = []
    for i, p in enumerate(pruned):
        faster = [f"{b['speedup'][i]:.2f}x ({b['speedup_of_modules'][i]:.2f}x)" for b in batches.values()]
        rows.append(
            [p.target, f"{p.rho:g}", str(p.round_to), f"-{p.params_removed:.1%}", f"-{p.macs_removed:.1%}", *faster]
        )
    unpruned = ", ".join(f"{1e3 * b['unpruned']['median']:.3g} ms for {batch}" for batch, b in batches.items())
    return f"{name}: {unpruned}\n{table(header, rows)}"


if __name__ == "__main__":
    main()
