"""Masks single weights of a network trained on CIFAR-10 and measures what is left on all 10,000 test images.

python benchmarks/unstructured.py --weights resnet56.safetensors --data CIFAR10_DIR [--rho .8 .9] [--steps 1000]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cifar10_data import Loader, accuracy, read
from common import settings, write_json
from models import CIFAR10_MODELS, load
from torch import nn

import singe


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    model = load(options.model, options.weights).to(options.device, memory_format=torch.channels_last)
    train, test = ([part.to(options.device) for part in read(options.data, train=which)] for which in (True, False))
    outcomes, before = [], accuracy(model, *test)
    for rho in options.rho:
        for criterion in options.criteria:
            outcomes.append(outcome(model, Loader(*train, options.batch_size), rho, criterion, options, test))
            print(json.dumps(outcomes[-1]), flush=True)
    if options.json:
        write_json(options.json, {"options": settings(options), "top1_before": before, "outcomes": outcomes})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CIFAR10_MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, required=True, help="a safetensors file, as train_cifar10.py writes it")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rho", type=float, nargs="*", default=[0.8, 0.9], help="shares of the weights")
    parser.add_argument("--criteria", nargs="*", default=["integrated_gradient", "magnitude"])
    parser.add_argument("--allocation", default="uniform", help="uniform, block, linear or global")
    parser.add_argument("--steps", type=int, default=1000, help="of fine-tuning in all; 0 for none")
    parser.add_argument("--when", default=singe.FineTune.when, help="to fine-tune: layer or after")
    parser.add_argument("--lr", type=float, default=singe.FineTune.lr)
    parser.add_argument("--recalibrate-bn", type=int, default=2048, help="images to measure batch norms anew on")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def outcome(
    model: nn.Module, loader: Loader, rho: float, criterion: str, options: argparse.Namespace, test: list[torch.Tensor]
) -> dict[str, Any]:
    """What one run comes to, as JSON."""
    finetune = singe.FineTune(steps=options.steps, when=options.when, lr=options.lr) if options.steps else None
    start = time.perf_counter()
    result = singe.prune(
        model, loader, rho, structured=False, criterion=criterion, allocation=options.allocation, finetune=finetune,
        recalibrate_bn=options.recalibrate_bn, seed=options.seed,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    result.make_permanent()
    return {
        "rho": rho, "criterion": criterion, "top1": accuracy(result.model, *test), "seconds": seconds,
        "seconds_scoring": sum(r.seconds_scoring for r in result.history),
        "seconds_tuning": sum(r.seconds_tuning for r in result.history),
        "weights_before": result.weights_before, "weights_after": result.weights_after,
        "params_before": result.params_before, "params_after": result.params_after,
    }  # fmt: skip


if __name__ == "__main__":
    main()
