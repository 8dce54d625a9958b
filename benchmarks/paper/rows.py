"""A table's rows: networks that are pruned, measured, fine-tuned, measured again, and never twice."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from measuring.common import machine
from torch import nn

import singe
from paper.recipe import LR, Baseline, Stopwatch, training
from paper.records import Records, Settings

PLAIN = {"allocation": "uniform", "compensate": "none"}
"""The default arguments of a method: the paper's."""


@dataclass(frozen=True)
class Row:
    """A network to prune and to measure.

    Attributes:
        name: of the method, for people.
        settings: all that decides the result, as JSON, except the baseline and fine-tuning after pruning.
        prune: makes the smaller network from the baseline; may keep in a directory what a killed run continues from.
        tuned: the training inside ``prune``, if any; then there is none after it.
    """

    name: str
    settings: Settings
    prune: Callable[[Baseline, Path | None], nn.Module]
    tuned: singe.FineTune | None = None


def singe_row(name: str, arguments: Mapping[str, Any], settings: Settings, tuned: singe.FineTune | None = None) -> Row:
    """A row that ``singe.prune`` makes.

    Args:
        name: of the method.
        arguments: of ``singe.prune``.
        settings: "rate" and "seed" are arguments, too; with "folded", the batch norms are folded before.
        tuned: fine-tuning between removals.
    """

    def prune(baseline: Baseline, unfinished: Path | None) -> nn.Module:
        model = baseline.folded() if settings.get("folded") else baseline.model
        return singe.prune(
            model, baseline.loader, settings["rate"], seed=settings["seed"], ignore=baseline.ignore,
            finetune=tuned, progress=False, checkpoint=unfinished, **PLAIN | arguments,
        ).model  # fmt: skip

    told = {key: value if isinstance(value, (int, float, str)) else repr(value) for key, value in arguments.items()}
    return Row(name, {"tool": "singe", "method": name, **settings, "arguments": told}, prune, tuned)


def measure(rows: Sequence[Row], baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    """Runs the missing runs of the rows that ``--only`` names, with each number of ``--steps``.

    A loss that is not finite is a finding, kept as "problem".
    """
    for row in rows:
        if any(fnmatchcase(row.name, pattern) for pattern in options.only):
            for plan, found in _measured(row, baseline, records, options):
                settings = key(row, baseline, options, plan)
                origin = {"machine": machine(), "checksums": baseline.checksums}
                records.add(settings, found | ({"tuned_in": plan.precision or "float32"} if plan else {}) | origin)
                print(row.name, {k: settings[k] for k in ("rate", "seed", "steps")}, found, flush=True)


def key(row: Row, baseline: Baseline, options: argparse.Namespace, plan: singe.FineTune | None) -> Settings:
    """The settings that a run of a row is found again by."""
    return {
        "model": baseline.name, "weights": baseline.checksums["weights"][:12], "batch_size": options.batch_size,
        "ignore": list(baseline.ignore), **row.settings, "steps": plan.steps if plan else 0,
        "finetune": _named(plan) if plan else None, **(_unusual(plan) if plan else {}),
    }  # fmt: skip


def _named(plan: singe.FineTune) -> str:
    """Fine-tuning as records name it: without what they are older than, where it is as it was then."""
    return repr(plan).replace("hints=0.0, ", "").replace("optimizer='sgd', ", "")


def _unusual(plan: singe.FineTune) -> Settings:
    """The settings of fine-tuning that differ from most tables."""
    return ({"lr": plan.lr} if plan.lr != LR else {}) | ({"hints": plan.hints} if plan.hints else {})


def _measured(
    row: Row, baseline: Baseline, records: Records, options: argparse.Namespace
) -> Iterator[tuple[singe.FineTune | None, dict[str, Any]]]:
    """(fine-tuning, findings) of missing runs, each as soon as it is done."""

    def missing(plan: singe.FineTune | None) -> bool:
        return records.find(key(row, baseline, options, plan)) is None

    after = [training(options, steps, "after") if steps else None for steps in sorted(set(options.steps))]
    wanted = [plan for plan in ([row.tuned] if row.tuned else after) if missing(plan)]
    if wanted:
        same = key(row, baseline, options, row.tuned) | {"revision": machine()["revision"]}
        with records.unfinished(same) as directory:
            yield from _runs(row, baseline, missing, wanted, directory)


def _runs(
    row: Row, baseline: Baseline, missing: Callable[[singe.FineTune | None], bool],
    wanted: Sequence[singe.FineTune | None], unfinished: Path | None,
) -> Iterator[tuple[singe.FineTune | None, dict[str, Any]]]:  # fmt: skip
    """The same, pruned once; what a killed process left of that in ``unfinished`` is continued."""
    continued, watch = unfinished is not None and any(unfinished.glob("*.safetensors")), Stopwatch()
    try:
        pruned = row.prune(baseline, unfinished).to(memory_format=torch.channels_last)
    except ValueError as error:
        yield from ((plan, {"problem": str(error)}) for plan in wanted)
        return
    found = {"continued": True} if continued else {"seconds_pruning": watch.seconds}
    found |= baseline.described(pruned)
    if row.tuned:
        yield row.tuned, found | {"top1_tuned": baseline.accuracy(pruned)}
        return
    found["top1_pruned"] = baseline.accuracy(pruned)
    found["top1_recalibrated"] = baseline.recalibrated_top1(pruned, row.settings["seed"])
    if missing(None):  # costs nothing more
        yield None, found
    for plan in wanted:
        if plan and missing(plan):  # another process may have done it
            yield plan, found | _tuned(pruned, row, baseline, plan)


def _tuned(pruned: nn.Module, row: Row, baseline: Baseline, plan: singe.FineTune) -> dict[str, Any]:
    model, watch = copy.deepcopy(pruned), Stopwatch()
    try:
        baseline.tune(model, plan, row.settings["seed"])
    except ValueError as error:
        return {"problem": str(error)}
    return {"seconds_tuning": watch.seconds, "top1_tuned": baseline.accuracy(model)}
