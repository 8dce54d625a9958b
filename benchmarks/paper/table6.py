"""Single weights instead of neurons: masked layer by layer, with and without fine-tuning in between.

The paper's table 6, beside what else scores single weights. All convolutions and linear layers are open to it, and a
rate is a share of their weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from torch import nn

import singe
from paper import tables
from paper.recipe import Baseline, training
from paper.records import Record, Records
from paper.rows import Row, measure
from paper.size import Size

CPU = Size(rates=(0.8, 0.9), steps=(0, 1000))
FULL = Size(rates=(0.8, 0.9), steps=(0, 1000, 5000), seeds=(0, 1, 2))
IMAGES = 512
"""To score on: the gradient at a single weight is noisy."""
CRITERIA = ("integrated_gradient", "magnitude", "magnitude_gradient", "random")
ROWS = ("model", "rate", "method")
"""The settings that a row of the table is found by."""


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    baseline = dataclasses.replace(baseline, ignore=())
    untuned = argparse.Namespace(**vars(options) | {"steps": [0]})
    measure([row for row in rows(options) if row.tuned is None and 0 in options.steps], baseline, records, untuned)
    measure([row for row in rows(options) if row.tuned is not None], baseline, records, options)


def rows(options: argparse.Namespace) -> list[Row]:
    """A row for each criterion, rate, seed and number of steps: masks hold only where the training is singe's own."""
    return [
        _row(*which, training(options, steps, "layer") if steps else None)
        for *which, steps in itertools.product(CRITERIA, options.rates, options.seeds, options.steps)
    ]


def _row(criterion: str, rate: float, seed: int, plan: singe.FineTune | None) -> Row:
    def prune(baseline: Baseline, unfinished: Path | None) -> nn.Module:
        result = singe.prune(
            baseline.model, baseline.loader, rate, structured=False, criterion=criterion, finetune=plan, seed=seed,
            images=IMAGES, progress=False, checkpoint=unfinished,
        )  # fmt: skip
        result.make_permanent()
        return result.model

    return Row(
        criterion, {"tool": "singe", "method": criterion, "rate": rate, "seed": seed, "images": IMAGES}, prune, plan
    )


def page(records: Sequence[Record]) -> str:
    """Ordered by rate."""
    found = tables.latest(records, ROWS)
    found.sort(key=lambda r: r["settings"]["rate"])
    return tables.table(found, ROWS, tables.accuracies(found))
