"""ResNet-50 and MobileNetV2 on ImageNet at the paper's shares, with fine-tuning entwined and afterwards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from paper import table3
from paper.recipe import Baseline
from paper.records import Record, Records
from paper.rows import measure
from paper.size import Size

CPU = Size(rates=(0.5,), steps=(1000,))
FULL = Size(steps=(5000,), seeds=(0, 1, 2))
RATES = {"resnet50": (0.508, 0.638), "mobilenet_v2": (0.31, 0.41, 0.5)}


def baseline(options: argparse.Namespace) -> Baseline:
    """A network of torchvision on the folder ``--data``; needs torchvision."""
    from paper import imagenet_data

    return imagenet_data.baseline(options)


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    rates = options.rates or RATES[baseline.name]
    measure(table3.rows(argparse.Namespace(**vars(options) | {"rates": rates})), baseline, records, options)


def page(records: Sequence[Record]) -> str:
    """Ordered by network and rate."""
    return table3.page(records)
