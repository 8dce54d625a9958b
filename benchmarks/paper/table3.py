"""Networks for CIFAR-10 at the paper's shares, by its method and by what does best, tuned afterwards and entwined."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from paper import tables
from paper.methods import BEST, METHODS, PAPER
from paper.recipe import Baseline, training
from paper.records import Record, Records
from paper.rows import Row, measure, singe_row
from paper.size import Size

CPU = Size(rates=(0.843,), steps=(1000,))
FULL = Size(rates=(0.843, 0.913), steps=(5000,), seeds=(0, 1, 2))
ROWS = ("model", "ignore", "rate", "method", "when")
"""The settings that a row of the table is found by."""


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    measure(rows(options), baseline, records, options)


def rows(options: argparse.Namespace) -> list[Row]:
    """Each method with fine-tuning afterwards, and entwined."""
    found = []
    for seed, rate, name in itertools.product(options.seeds, options.rates, (PAPER, BEST)):
        where = {"rate": rate, "seed": seed}
        found.append(singe_row(name, METHODS[name], where | {"when": "after"}))
        for steps in [s for s in options.steps if s]:
            plan = training(options, steps, "layer")
            found.append(singe_row(f"{name}, entwined", METHODS[name], where | {"when": "layer"}, tuned=plan))
    return found


def page(records: Sequence[Record]) -> str:
    """Ordered by network and rate."""
    found = tables.latest(records, ROWS)
    found.sort(key=lambda r: (r["settings"]["model"], r["settings"]["rate"]))
    return tables.table(found, ROWS, tables.accuracies(found))
