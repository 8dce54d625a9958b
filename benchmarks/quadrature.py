"""How few nodes rank like the paper's 91 steps, on a trained ResNet-56 and real images.

python benchmarks/quadrature.py --weights resnet56.safetensors --data CIFAR10_DIR [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cifar10_data import normalised, read
from common import spearman, write_json
from models import load

import singe
from singe.quadrature import Quadrature
from singe.report import table

LAYERS = ["blocks.1.conv1", "blocks.12.conv1", "blocks.24.conv1"]  # one a stage
QUADRATURES: dict[str, Quadrature] = {f"GaussLegendre({n})": singe.GaussLegendre(n) for n in (1, 2, 4, 8)}
QUADRATURES |= {"Geometric(.8)": singe.Geometric(0.8), "Geometric(.95, 10)": singe.Geometric(0.95, 10)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load("resnet56", options.weights)
    images, labels = read(options.data, train=True)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: options.images]
    batch = normalised(images[chosen]), labels[chosen]

    rows = []
    for layer in LAYERS:
        exact = score(model, batch, layer, singe.Geometric(0.95))
        for name, quadrature in QUADRATURES.items():
            scores = score(model, batch, layer, quadrature)
            rows.append(
                {
                    "layer": layer,
                    "quadrature": name,
                    "spearman": spearman(scores, exact),
                    "same_least": bool(scores.argmin() == exact.argmin()),
                }
            )
    text = [[r["layer"], r["quadrature"], f"{r['spearman']:.4f}", str(r["same_least"])] for r in rows]
    print(table(["layer", "against Geometric(.95)", "Spearman", "same least"], text))
    if options.json:
        write_json(options.json, {"images": options.images, "rows": rows})


def score(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor], layer: str, quadrature: Quadrature
) -> torch.Tensor:
    return singe.score(model, batch, layer, criterion=singe.IntegratedGradient(quadrature=quadrature))


if __name__ == "__main__":
    main()
