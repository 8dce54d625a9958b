"""A table's rows: networks that are pruned, measured, fine-tuned, measured again, and never twice."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from common import machine
from torch import nn

import singe
from paper.recipe import Baseline, Stopwatch
from paper.records import Records, Settings


@dataclass(frozen=True)
class Row:
    """A network to prune and to measure.

    Attributes:
        name: of the method, for people.
        settings: all that decides what comes out, as JSON, but for the baseline and fine-tuning after pruning.
        prune: makes the smaller network of the baseline.
        tuned: the training inside of ``prune``, if there is some; then there is none after it.
    """

    name: str
    settings: Settings
    prune: Callable[[Baseline], nn.Module]
    tuned: singe.FineTune | None = None


def singe_row(name: str, arguments: Mapping[str, Any], settings: Settings, tuned: singe.FineTune | None = None) -> Row:
    """A row that ``singe.prune`` makes.

    Args:
        name: of the method.
        arguments: of ``singe.prune``.
        settings: "rate" and "seed" are arguments, too; what else there is tells rows apart.
        tuned: fine-tuning between removals.
    """

    def prune(baseline: Baseline) -> nn.Module:
        return singe.prune(
            baseline.model, baseline.loader, settings["rate"], seed=settings["seed"], ignore=baseline.ignore,
            finetune=tuned, progress=False, **arguments,
        ).model  # fmt: skip

    told = {key: value if isinstance(value, (int, float, str)) else repr(value) for key, value in arguments.items()}
    return Row(name, {"tool": "singe", "method": name, **settings, "arguments": told}, prune, tuned)


def measure(rows: Sequence[Row], baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    """Runs what is missing of the rows that ``--only`` names, with each number of ``--steps``."""
    for row in rows:
        if not any(fnmatchcase(row.name, pattern) for pattern in options.only):
            continue
        _measure(row, baseline, records, options)


def key(row: Row, baseline: Baseline, options: argparse.Namespace, plan: singe.FineTune | None) -> Settings:
    """The settings that a run of a row is found again by."""
    return {
        "model": baseline.name, "weights": baseline.checksums["weights"][:12], "batch_size": options.batch_size,
        "ignore": list(baseline.ignore), **row.settings, "steps": plan.steps if plan else 0,
        "finetune": repr(plan) if plan else None,
    }  # fmt: skip


def _measure(row: Row, baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    after = [singe.FineTune(steps=steps, when="after") if steps else None for steps in sorted(set(options.steps))]
    plans = [row.tuned] if row.tuned else after
    wanted = [plan for plan in plans if records.find(key(row, baseline, options, plan)) is None]
    if not wanted:
        return
    watch = Stopwatch()
    pruned = row.prune(baseline).to(memory_format=torch.channels_last)
    found = {"seconds_pruning": watch.seconds, **baseline.described(pruned)}
    if row.tuned is None:
        found["top1_pruned"] = baseline.top1(pruned)
        found["top1_recalibrated"] = baseline.recalibrated_top1(pruned, row.settings["seed"])
        wanted = wanted if None in wanted else [None, *wanted]  # costs nothing more
    for plan in wanted:
        tuned = found | _tuned(pruned, row, baseline, plan)
        origin = {"machine": machine(), "checksums": baseline.checksums}
        settings = key(row, baseline, options, plan)
        if records.find(settings) is None:
            records.add(settings, tuned | origin)
            print(row.name, {k: v for k, v in settings.items() if k in ("ranking", "rate", "seed", "steps")}, tuned,
                  flush=True)  # fmt: skip


def _tuned(pruned: nn.Module, row: Row, baseline: Baseline, plan: singe.FineTune | None) -> dict[str, Any]:
    if plan is None:
        return {}
    if row.tuned is not None:
        return {"top1_tuned": baseline.top1(pruned)}
    model, watch = copy.deepcopy(pruned), Stopwatch()
    baseline.tune(model, plan, row.settings["seed"])
    return {"seconds_tuning": watch.seconds, "top1_tuned": baseline.top1(model)}
