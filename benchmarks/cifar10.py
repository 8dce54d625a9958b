"""Prunes a network trained on CIFAR-10 and measures what is left on all 10,000 test images.

python benchmarks/cifar10.py --weights resnet56.safetensors --data CIFAR10_DIR --rho 0.5 [--steps 1000] [--json FILE]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring.common import settings, write_json
from models import CIFAR10_MODELS, load, random_images
from torch import nn

import singe
from singe.cifar10 import Loader, Ordered, read
from singe.training.accuracy import accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # in channels_last a CPU trains a quarter faster
    model = load(options.model, options.weights).to(options.device, memory_format=torch.channels_last)
    result, seconds = run(model, options)
    summary = {"options": settings(options), **report(model, result, options), "seconds": seconds}
    for name, value in summary.items():
        print(f"{name}: {value}")
    if options.json:
        write_json(options.json, summary)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CIFAR10_MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file, as train_cifar10.py writes it")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--target", default="params", help="what rho is a share of: params or macs")
    parser.add_argument("--allocation", default="sensitivity", help="uniform, block, linear, global or sensitivity")
    parser.add_argument("--round-to", type=int, default=1, help="leave layers a multiple of this many neurons")
    parser.add_argument("--ignore", nargs="*", default=[], help="modules to leave whole")
    parser.add_argument("--criterion", default="integrated_gradient")
    parser.add_argument("--nodes", type=int, default=2, help="of integrated_gradient")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning in total; 0 for none")
    parser.add_argument("--when", default=singe.FineTune.when, help="to fine-tune: layer, neuron or after")
    parser.add_argument("--lr", type=float, default=singe.FineTune().learning_rate)
    parser.add_argument("--compensate", default="least_squares", help="none, mean or least_squares")
    parser.add_argument("--compensation-images", type=int, default=1024)
    parser.add_argument("--recalibrate-bn", type=int, default=0, help="images to re-estimate batch norms on")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.weights is None:
        parser.error("expected --weights FILE: pruning random weights says nothing; train_cifar10.py trains some")
    return options


def run(model: nn.Module, options: argparse.Namespace) -> tuple[singe.PruneResult, float]:
    """Prunes as the options say; returns the result and the seconds it took."""
    loader = Loader(*(part.to(options.device) for part in read(options.data, train=True)), options.batch_size)
    finetune = singe.FineTune(steps=options.steps, when=options.when, lr=options.lr) if options.steps else None
    criterion = options.criterion
    if criterion == "integrated_gradient":
        criterion = singe.IntegratedGradient(quadrature=singe.GaussLegendre(options.nodes))
    start = time.perf_counter()
    result = singe.prune(
        model, loader, options.rho, criterion=criterion, target=options.target, allocation=options.allocation,
        round_to=options.round_to, finetune=finetune, recalibrate_bn=options.recalibrate_bn, ignore=options.ignore,
        seed=options.seed, compensate=options.compensate, compensation_images=options.compensation_images,
    )  # fmt: skip
    return result, time.perf_counter() - start


def report(model: nn.Module, result: singe.PruneResult, options: argparse.Namespace) -> dict[str, Any]:
    """What pruning did to ``model``, as JSON."""
    test = Ordered(*(part.to(options.device) for part in read(options.data, train=False)))
    figures: dict[str, Any] = {"top1_before": accuracy(model, test), "top1_after": accuracy(result.model, test)}
    for name in ("params", "macs"):
        for what in ("before", "after", "removed"):
            figures[f"{name}_{what}"] = getattr(result, f"{name}_{what}")
    for images in (64, 1):
        x = random_images(images)[0].to(options.device)
        before, after = (found.median for found in singe.latencies([model, result.model], x))
        figures |= {f"latency_{images}_before": before, f"latency_{images}_after": after}
    return figures | {
        "seconds_scoring": sum(r.seconds_scoring for r in result.history),
        "seconds_compensating": sum(r.seconds_compensating for r in result.history),
        "seconds_tuning": sum(r.seconds_tuning for r in result.history),
        "neurons_scored": sum(r.neurons_scored for r in result.history),
        "neurons_removed": sum(len(r.removed) for r in result.history),
        "frozen": result.frozen,
    }


if __name__ == "__main__":
    main()
