"""Fine-tuning after pruning against entwined with it, with batch norms and with all of them folded before.

The paper's table 2, by integrated gradients. The paper folds batch norms before it prunes and trains.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import singe
from paper import tables
from paper.recipe import Baseline
from paper.records import Record, Records
from paper.rows import Row, measure, singe_row
from paper.size import Size

CPU = Size(rates=(0.85,), steps=(1000,))
FULL = Size(rates=(0.85, 0.9), steps=(1000, 2000, 5000), seeds=(0, 1, 2))
ARGUMENTS = {"criterion": singe.criteria.IntegratedGradient()}


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    measure(rows(options), baseline, records, options)


def rows(options: argparse.Namespace) -> list[Row]:
    """After pruning in one row, whatever the steps; entwined in one for each number of steps."""
    found = []
    for seed, rate, folded in itertools.product(options.seeds, options.rates, (False, True)):
        where = {"rate": rate, "seed": seed, "folded": folded}
        name = "folded, " if folded else ""
        found.append(singe_row(f"{name}after", ARGUMENTS, where | {"when": "after"}))
        for when, steps in itertools.product(("layer", "neuron"), [s for s in options.steps if s]):
            plan = singe.FineTune(steps=steps, when=when)
            found.append(singe_row(f"{name}{when}", ARGUMENTS, where | {"when": when}, tuned=plan))
    return found


def page(records: Sequence[Record]) -> str:
    """Ordered by rate."""
    found = tables.latest(records, ("model", "ignore", "rate", "folded", "when", "seed", "steps"))
    found.sort(key=lambda r: r["settings"]["rate"])
    return tables.table(found, ("model", "rate", "folded", "when"), tables.accuracies(found))
