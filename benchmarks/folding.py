"""How many batch norms of well-known networks fold away, why the others stay, and how much the outputs change.

python benchmarks/folding.py resnet50 densenet121 hrnet_w18_small [--dtypes float64] [--json FILE]

Networks are torchvision's or else timm's, with random weights and batch norms far from their defaults.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring.common import settings, write_json
from measuring.timing import timed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import singe
from singe.table import table

SIDES = {"inception_v3": 299, "mobilevit_s": 256}
"""The side of the images that a network is made for, if not 224."""


@dataclass(frozen=True)
class Outcome:
    """One network folded.

    Attributes:
        model: its name.
        dtype: of its weights.
        norms: how many batch norms it has.
        folded: how many of them are gone.
        error: the largest difference in an output, relative to the differences between outputs of different images.
        rounding: the same between the original network and the same in float64.
        seconds: of ``singe.fold_batchnorm``, all its checks included.
        unfolded: why others stay -> their names.
    """

    model: str
    dtype: str
    norms: int
    folded: int
    error: float
    rounding: float
    seconds: float
    unfolded: dict[str, list[str]]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    outcomes = []
    for name in options.models:
        torch.manual_seed(options.seed)
        side = SIDES.get(name, 224)
        x = torch.randn(options.batch, 3, side, side)
        model = randomised(load(name), x)
        for dtype in options.dtypes:
            outcomes.append(measure(name, model, x, dtype))
            print(reasons(outcomes[-1]), flush=True)
    print(text(outcomes))
    if options.json:
        write_json(options.json, {"options": settings(options), "outcomes": [asdict(o) for o in outcomes]})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names of torchvision or timm")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def load(name: str) -> nn.Module:
    """A network of torchvision, or else of timm, with random weights.

    Raises:
        ValueError: neither has it.
    """
    import timm
    from torchvision import models

    if name in models.list_models():
        own: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        network: nn.Module = models.get_model(name, weights=None, **own)
        return network
    if not timm.is_model(name):
        raise ValueError(f"expected a model of torchvision or timm, got {name!r}")
    return timm.create_model(name)


@torch.no_grad()
def randomised(model: nn.Module, x: Tensor) -> nn.Module:
    """Gives batch norms random weights and statistics around those of ``x``, so that signals get through; eval mode."""
    norms: dict[Any, float | None] = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    for norm in norms:
        norm.momentum = 1.0
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.5)
    model.train()(x)
    for norm, momentum in norms.items():
        norm.momentum = momentum
        norm.running_mean += 0.5 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 1.5)
    return model.eval()


@torch.no_grad()
def measure(name: str, model: nn.Module, x: Tensor, dtype: str) -> Outcome:
    """Folds a network and compares the outputs."""
    exact = copy.deepcopy(model).double()(x.double())
    model, x = copy.deepcopy(model).to(getattr(torch, dtype)), x.to(getattr(torch, dtype))
    folding, seconds = timed(lambda: singe.fold_batchnorm(model, x), x.device)
    expected, apart = model(x), (exact - exact.mean(0)).abs().max()
    error, rounding = ((y - expected).abs().max() / apart for y in (folding.model(x), exact))
    unfolded: dict[str, list[str]] = {}
    for norm, reason in folding.unfolded.items():
        unfolded.setdefault(reason, []).append(norm)
    norms, folded = len(folding.folded) + len(folding.unfolded), len(folding.folded)
    return Outcome(name, dtype, norms, folded, float(error), float(rounding), seconds, unfolded)


def text(outcomes: Sequence[Outcome]) -> str:
    header = ["model", "dtype", "batch norms", "folded", "error", "rounding", "seconds"]
    return table(
        header,
        [
            [o.model, o.dtype, str(o.norms), str(o.folded), f"{o.error:.1e}", f"{o.rounding:.1e}", f"{o.seconds:.1f}"]
            for o in outcomes
        ],
    )


def reasons(outcome: Outcome) -> str:
    """Why batch norms stay and how many, without the places of operators."""
    counts: Counter[str] = Counter()
    for reason, names in outcome.unfolded.items():
        counts[re.sub(r"(aten\S+) in [^\s;,]+", r"\1", reason)] += len(names)
    lines = [
        f"{outcome.model}: {count} {'stays' if count == 1 else 'stay'}: {reason}" for reason, count in counts.items()
    ]
    return "\n".join(lines or [f"{outcome.model}: all {outcome.norms} fold"])


if __name__ == "__main__":
    main()
