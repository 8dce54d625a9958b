"""Trains a network on CIFAR-10 with and without gradual pruning, by relevance and by other scores, from one seed.

python benchmarks/gradual.py --data CIFAR10_DIR [--model resnet20 --epochs 40] [--json FILE] [--device cuda --bf16]
python benchmarks/gradual.py --data CIFAR10_DIR --full --device cuda    # ResNet-110 as published, 200 epochs
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring.common import settings, write_json
from models import CIFAR10_MODELS, load
from torch import Tensor, nn
from train_cifar10 import train

import singe
from singe.cifar10 import Loader, read
from singe.table import table

PRESETS = {"resnet56": "resnet56_cifar", "resnet110": "resnet110_cifar", "vgg16_bn": "vgg16_cifar10"}
CHANNELS = {"resnet20": 34}
"""Channels in each of seven rounds, where nothing is published: about a third of the layers' channels in total."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    training, test = (
        tuple(part.to(options.device) for part in read(options.data, train=train)) for train in (True, False)
    )
    runs = {score: run(score, training, test, options) for score in options.scores}
    print(report(runs))
    if options.json:
        write_json(options.json, {"options": settings(options), "schedule": schedule(options), "runs": runs})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=CIFAR10_MODELS, default="resnet20")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--scores", nargs="+", default=["none", "feature_relevance", "magnitude"])
    parser.add_argument("--preset", help="published settings, rescaled to --epochs; those of the model by default")
    parser.add_argument("--every", type=int, help="epochs between rounds, instead of the preset's")
    parser.add_argument("--per-round", type=int, help="channels to mask in each")
    parser.add_argument("--until", type=int, help="the last epoch with a round")
    parser.add_argument("--images", type=int, default=1024, help="that a round scores on")
    parser.add_argument("--ignore", nargs="*", default=[], help="modules to leave whole")
    parser.add_argument("--full", action="store_true", help="the published run: ResNet-110, 200 epochs")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="at the top of the cycle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 while training")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.full:
        options.model, options.epochs = "resnet110", 200
    return options


def schedule(options: argparse.Namespace) -> dict[str, int]:
    """When a round takes place and how many channels it masks."""
    name = options.preset or PRESETS.get(options.model, "resnet110_cifar")
    chosen = singe.gradual_preset(name, options.epochs)
    if not options.preset and options.model in CHANNELS:
        chosen["per_round"] = CHANNELS[options.model]
    given = {"every": options.every, "per_round": options.per_round, "until": options.until}
    return chosen | {name: value for name, value in given.items() if value is not None}


def run(
    score: str, training: tuple[Tensor, ...], test: tuple[Tensor, ...], options: argparse.Namespace
) -> dict[str, Any]:
    """One training run, unpruned if ``score`` is "none"; returns its results as JSON."""
    torch.manual_seed(options.seed)
    model = load(options.model).to(options.device, memory_format=torch.channels_last).train()
    loader = Loader(*training, options.batch_size)
    example = torch.zeros(2, 3, 32, 32, device=options.device)
    pruner = None
    if score != "none":
        pruner = singe.GradualPruner(
            model, example, criterion=score, images=options.images, ignore=options.ignore, **schedule(options)
        )
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    top1 = train(model, loader, test, options, pruner.epoch_end if pruner is not None else None)
    figures: dict[str, Any] = {"top1": top1[-1], "top1_of_epochs": top1, "seconds": time.perf_counter() - start}
    return figures if pruner is None else figures | pruned(model, pruner.finish(), figures["seconds"], options.epochs)


def pruned(model: nn.Module, result: singe.PruneResult, seconds: float, epochs: int) -> dict[str, Any]:
    """What was removed, and how long it took."""
    device = next(model.parameters()).device
    sizes = [f"{name}_{what}" for name in ("params", "macs") for what in ("before", "after")]
    round_seconds = [record.seconds for record in result.history]
    latencies = singe.latencies([model, result.model], torch.zeros(64, 3, 32, 32, device=device))
    return {name: getattr(result, name) for name in sizes} | {
        "channels": sum(record.channels for record in result.history),
        "seconds_of_rounds": round_seconds,
        "round_per_epoch": sum(round_seconds) / len(round_seconds) * epochs / (seconds - sum(round_seconds)),
        "latency_64_before": latencies[0].median,
        "latency_64_after": latencies[1].median,
        "losses_of_rounds": [[record.loss_start, record.loss_removed] for record in result.history],
        "widths": {r.group: [r.size, r.size - len(r.neurons)] for r in result.plan.removals},
        "frozen": result.frozen,
    }


def report(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each run."""
    header = ["score", "top-1", "channels gone", "parameters", "multiply-adds", "a round, of an epoch"]
    rows = []
    for score, found in runs.items():
        row = [score, f"{found['top1']:.2%}"]
        if "channels" in found:
            smaller = found["params_before"] / found["params_after"]
            macs = found["macs_after"] / found["macs_before"] - 1
            row += [str(found["channels"]), f"{smaller:.2f}x fewer", f"{macs:.1%}", f"{found['round_per_epoch']:.1%}"]
        rows.append(row + [""] * (len(header) - len(row)))
    return table(header, rows)


if __name__ == "__main__":
    main()
