"""Records as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from zoo_table import markdown

from paper.recipe import LR
from paper.records import Record

Cell = Callable[[Sequence[Record]], str]
"""Turns the records of a row, of all seeds and steps, into text."""


class Training(NamedTuple):
    """How a run was fine-tuned."""

    steps: int
    lr: float = LR
    hints: float = 0.0

    def __str__(self) -> str:
        rest = f", lr {self.lr}" * (self.lr != LR) + f", hints {self.hints:g}" * bool(self.hints)
        return f"{self.steps:,} steps{rest}"


RUN = ("seed", *Training._fields)
"""The settings that the runs of one row of a table differ in."""


def latest(records: Iterable[Record], rows: Sequence[str]) -> list[Record]:
    """The last record of each run of the rows that these settings name, in order of first appearance."""
    found: dict[tuple[Any, ...], Record] = {}
    for record in records:
        found[tuple(str(record["settings"].get(name)) for name in (*rows, *RUN))] = record
    return list(found.values())


def table(records: Sequence[Record], rows: Sequence[str], columns: dict[str, Cell]) -> str:
    """A table with a row for each value of the settings named by ``rows``, in order of first appearance."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(_told(record["settings"].get(name)) for name in rows), []).append(record)
    lines = [[*values, *(cell(of) for cell in columns.values())] for values, of in groups.items()]
    return markdown([*rows, *columns], lines)


def share(key: str, training: Training | None = None) -> Cell:
    """The mean over seeds of a share, in percent, with the deviation if there are several; of runs trained so."""

    def cell(records: Sequence[Record]) -> str:
        of_seed = {
            r["settings"]["seed"]: r[key]
            for r in records
            if r.get(key) is not None and training in (None, _training(r))
        }
        if not of_seed:
            return "-"
        spread = f" ± {100 * statistics.stdev(of_seed.values()):.2f}" if len(of_seed) > 1 else ""
        return f"{100 * statistics.fmean(of_seed.values()):.2f}{spread}"

    return cell


def seconds(key: str) -> Cell:
    """The mean of a time."""

    def cell(records: Sequence[Record]) -> str:
        times = [r[key] for r in records if key in r]
        return f"{statistics.fmean(times):.0f}" if times else "-"

    return cell


def tuned(records: Iterable[Record]) -> dict[str, Cell]:
    """A column for every number of fine-tuning steps, and for every other way of fine-tuning."""
    trainings = sorted({_training(r) for r in records if r["settings"]["steps"]})
    return {str(training): share("top1_tuned", training) for training in trainings}


def _training(record: Record) -> Training:
    settings = record["settings"]
    return Training(**{name: settings[name] for name in Training._fields if name in settings})


def accuracies(records: Sequence[Record]) -> dict[str, Cell]:
    """The columns that all tables of pruned networks have."""
    return {
        "parameters gone": share("params_removed"),
        "multiply-adds gone": share("macs_removed"),
        "pruned": share("top1_pruned"),
        "recalibrated": share("top1_recalibrated"),
        **tuned(records),
        "s to prune": seconds("seconds_pruning"),
        **({"problem": _problems} if any("problem" in r for r in records) else {}),
    }


def origin(records: Sequence[Record]) -> str:
    """Where the numbers of a table come from."""

    def told(key: str) -> str:
        return ", ".join(sorted({str(r["machine"][key]) for r in records}))

    sums = {k: sorted({r["checksums"][k][:12] for r in records}) for k in records[0]["checksums"]}
    of = "; ".join(f"{name} {', '.join(values)}" for name, values in sums.items())
    tuned_in = sorted({r.get("tuned_in", "float32") for r in records if "top1_tuned" in r})
    training = f", fine-tuned in {', '.join(tuned_in)}" if tuned_in else ""
    seeds = sorted({r["settings"]["seed"] for r in records if "seed" in r["settings"]})
    return (
        f"Seeds {', '.join(map(str, seeds))}; {told('processor')}, {told('threads')} threads, {told('device')}"
        f"{training}, torch {told('torch')}, singe at {told('revision')}, {told('date')}. SHA-256: {of}."
    )


def _problems(records: Sequence[Record]) -> str:
    return "; ".join(sorted({f"{r['settings']['steps']:,} steps: {r['problem']}" for r in records if "problem" in r}))


def _told(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else f"{round(100 * value, 2):g}%" if isinstance(value, float) else str(value)
