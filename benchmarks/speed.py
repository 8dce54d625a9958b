"""How fast scoring and pruning are, and what the shortcuts cost in exactness: layers, the whole algorithm, ranks.

python benchmarks/speed.py --model resnet56 [--weights FILE] [--data DIR] [--parts layers whole ranks] [--json FILE]

    layers  each layer: the engine against three ways in plain torch, the multiply-adds, and the floor; peak memory
    whole   singe.prune without fine-tuning against the paper's algorithm as written
    ranks   shortcuts of the score and of re-scoring against the exact ones

All numbers of a table come from one run; methods that are compared run in turns. Everything is float32 unless stated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from engine import layers, ranks, whole
from engine.subject import prepare
from measuring.common import settings, write_json
from models import CIFAR10_MODELS, MODELS

from singe.models.precision import arithmetic

PARTS: dict[str, ModuleType] = {"layers": layers, "whole": whole, "ranks": ranks}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    result: dict[str, Any] = {"options": settings(options)}
    with arithmetic("float32", torch.device(options.device)):
        subject = prepare(options)
        for part in options.parts:
            report = PARTS[part].measure(subject, options)
            result[part] = report.to_json()
            if options.json:  # after every part: the next one may take hours
                write_json(options.json, result)
            print(f"{report}\n", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file; random weights by default")
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10; noise by default")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batch", type=int, default=64, help="images that scores are computed on")
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 2], help="whole: every one; layers: the first")
    parser.add_argument("--memory", type=int, default=1 << 30, help="bytes that the engine may take")
    parser.add_argument("--layers", default="*", help="layers: a glob; those coupled to others are left out")
    parser.add_argument("--neurons", type=int, default=8, help="layers: how many of each to score")
    parser.add_argument("--rounds", type=int, default=3, help="layers: how often")
    parser.add_argument("--rho", type=float, default=0.8, help="whole: share of the parameters to remove")
    parser.add_argument("--rank-layers", nargs="*", help="ranks: which; by default three over the depth")
    parser.add_argument("--rank-batches", type=int, default=3, help="ranks: on which lazy re-scoring is compared")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.data is not None and options.model not in CIFAR10_MODELS:
        parser.error(f"expected a model for CIFAR-10 with --data ({', '.join(CIFAR10_MODELS)}), got {options.model}")
    return options


if __name__ == "__main__":
    main()
