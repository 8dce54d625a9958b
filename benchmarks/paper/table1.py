"""Criteria at the same share of the parameters: pruned, with batch norms recalibrated, and fine-tuned afterwards.

The paper's table 1 and what singe has beside it: random scores, the true loss change, reconstruction.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from paper import tables
from paper.methods import CRITERIA
from paper.recipe import Baseline
from paper.records import Record, Records
from paper.rows import Row, measure, singe_row
from paper.size import Size

CPU = Size(rates=(0.75, 0.85, 0.9), steps=(0, 1000))
FULL = Size(rates=(0.75, 0.85, 0.9), steps=(0, 1000, 5000), seeds=(0, 1, 2))
ROWS = ("model", "ignore", "rate", "method")
"""The settings that a row of the table is found by."""


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    measure(rows(options), baseline, records, options)


def rows(options: argparse.Namespace) -> list[Row]:
    """A row for each criterion, rate and seed."""
    return [
        singe_row(name, {"criterion": criterion}, {"rate": rate, "seed": seed})
        for seed in options.seeds
        for rate in options.rates
        for name, criterion in CRITERIA.items()
    ]


def page(records: Sequence[Record]) -> str:
    """Ordered by rate."""
    found = tables.latest(records, ROWS)
    found.sort(key=lambda r: r["settings"]["rate"])
    return tables.table(found, ROWS, tables.accuracies(found))
