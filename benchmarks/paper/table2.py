"""Fine-tuning after pruning against entwined with it, with batch norms and with all of them folded before.

The paper's table 2, and the same for what does best. The paper folds batch norms before it prunes and trains.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import singe
from paper import tables
from paper.methods import BEST, METHODS, PAPER
from paper.recipe import Baseline, training
from paper.records import Record, Records, Settings
from paper.rows import Row, measure, singe_row
from paper.size import Size

CPU = Size(rates=(0.85,), steps=(1000,))
FULL = Size(rates=(0.85, 0.9), steps=(1000, 2000, 5000), seeds=(0, 1, 2))
ROWS = ("model", "ignore", "rate", "method", "folded", "when")
"""The settings that a row of the table is found by."""


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    measure(rows(options), baseline, records, options)


def rows(options: argparse.Namespace) -> list[Row]:
    """After pruning in one row, whatever the steps; entwined in one for each number of steps."""
    found = []
    for seed, rate, method, folded in itertools.product(options.seeds, options.rates, (PAPER, BEST), (False, True)):
        where = {"rate": rate, "seed": seed, "folded": folded, "method": method}
        name = f"{method}, {'folded, ' if folded else ''}"
        found.append(_row(f"{name}after", where | {"when": "after"}))
        for when, steps in itertools.product(("layer", "neuron"), [s for s in options.steps if s]):
            found.append(_row(f"{name}{when}", where | {"when": when}, training(options, steps, when)))
    return found


def _row(name: str, settings: Settings, tuned: singe.FineTune | None = None) -> Row:
    return singe_row(name, METHODS[settings["method"]], settings, tuned)


def page(records: Sequence[Record]) -> str:
    """Ordered by rate."""
    found = tables.latest(records, ROWS)
    found.sort(key=lambda r: r["settings"]["rate"])
    return tables.table(found, ROWS, tables.accuracies(found))
