"""Torch-Pruning's criteria, singe's methods and training alone: the same share gone, the same fine-tuning."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from paper import tables, torch_pruning_peer
from paper.methods import METHODS
from paper.recipe import Baseline
from paper.records import Record, Records
from paper.rows import Row, measure, singe_row
from paper.size import Size

CPU = Size(rates=(0.75, 0.85, 0.9), steps=(0, 1000))
FULL = Size(rates=(0.5, 0.75, 0.85, 0.9), steps=(0, 1000, 5000), seeds=(0, 1, 2))
ROWS = ("model", "ignore", "rate", "tool", "method")
"""The settings that a row of the table is found by."""


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    measure(rows(options), baseline, records, options)


def rows(options: argparse.Namespace) -> list[Row]:
    """The control first, then method by method, all that can be run here."""
    found = []
    peers = importlib.util.find_spec("torch_pruning") is not None
    if not peers:
        print("Torch-Pruning is not installed (pip install -e '.[peers]'): its rows are left out")
    for seed in options.seeds:
        found.append(Row("unpruned", {"tool": "none", "method": "unpruned", "rate": 0.0, "seed": seed}, _unpruned))
        for rate in options.rates:
            where = {"rate": rate, "seed": seed}
            if peers:
                for names in itertools.product(torch_pruning_peer.IMPORTANCES, torch_pruning_peer.RANKINGS):
                    found.append(_peer(*names, where))
            found += [singe_row(name, arguments, where) for name, arguments in METHODS.items()]
    return found


def _unpruned(baseline: Baseline, _: Path | None) -> nn.Module:
    return copy.deepcopy(baseline.model)


def _peer(importance: str, ranking: str, where: dict) -> Row:
    name = f"{importance}, {ranking}"

    def prune(baseline: Baseline, _: Path | None) -> nn.Module:
        return torch_pruning_peer.prune(baseline, importance, ranking, where["rate"], where["seed"])

    settings = {"tool": "Torch-Pruning", "method": name, **where, "images": torch_pruning_peer.IMAGES}
    return Row(f"Torch-Pruning {name}", settings, prune)


def page(records: Sequence[Record]) -> str:
    """Ordered by network and rate, tool by tool."""
    found = tables.latest(records, ROWS)
    found.sort(key=lambda r: [r["settings"][name] for name in ("model", "rate", "tool", "method")])
    return tables.table(found, ROWS, tables.accuracies(found))
