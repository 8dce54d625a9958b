"""How few nodes rank like the paper's 91 steps, on a trained ResNet-56 and real images.

python benchmarks/quadrature.py --weights resnet56.safetensors --data CIFAR10_DIR [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from engine.images import batches
from engine.ranks import EXACT, agreement
from measuring.common import write_json
from models import CIFAR10_MODELS, load

import singe
from singe.quadrature import Quadrature
from singe.table import table

LAYERS = ["blocks.1.conv1", "blocks.12.conv1", "blocks.24.conv1"]  # one a stage of ResNet-56
QUADRATURES: dict[str, Quadrature] = {f"GaussLegendre({n})": singe.GaussLegendre(n) for n in (1, 2, 4, 8)}
QUADRATURES |= {"Geometric(.8)": singe.Geometric(0.8), "Geometric(.95, 10)": singe.Geometric(0.95, 10)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    (batch,) = batches(options.model, options.data, options.images, 1, torch.device("cpu"))
    model = load(options.model, options.weights)

    rows = []
    for layer in options.layers:
        exact = score(model, batch, layer, EXACT)
        for name, quadrature in QUADRATURES.items():
            scores = score(model, batch, layer, quadrature)
            rows.append({"layer": layer, "quadrature": name, **agreement(scores, exact)})
    text = [[r["layer"], r["quadrature"], f"{r['spearman']:.4f}", str(r["same_least"])] for r in rows]
    print(table(["layer", "against Geometric(.95)", "Spearman", "same least"], text))
    if options.json:
        write_json(options.json, {"images": options.images, "rows": rows})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CIFAR10_MODELS, default="resnet56")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def score(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layer: str, quadrature: Quadrature
) -> torch.Tensor:
    return singe.score(model, batch, layer, criterion=singe.IntegratedGradient(quadrature=quadrature))


if __name__ == "__main__":
    main()
