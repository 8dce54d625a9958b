"""The whole algorithm without fine-tuning: the cost of ``singe.prune``, against the paper's algorithm as written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from measuring.common import duration, mebibytes
from measuring.peak import with_peak
from measuring.timing import timed

import singe
from engine.images import loader
from engine.literal import NODES, Literal, extrapolate
from engine.subject import Subject
from singe.records import GroupRecord
from singe.table import table


@dataclass(frozen=True)
class Run:
    """One measured run of ``singe.prune``.

    Attributes:
        nodes: of the Gauss-Legendre quadrature.
        seconds: from the call to the result.
        peak: bytes it took at most; None where this is unknown.
        params_removed, macs_removed: shares of the network.
        loss_before, loss_after: on one batch.
        history: one record a group.
    """

    nodes: int
    seconds: float
    peak: int | None
    params_removed: float
    macs_removed: float
    loss_before: float
    loss_after: float
    history: list[GroupRecord]

    @property
    def scored_per_removal(self) -> float:
        """Neurons scored for each that was removed."""
        return sum(r.neurons_scored for r in self.history) / sum(len(r.removed) for r in self.history)


@dataclass(frozen=True)
class Whole:
    """The report: runs of ``singe.prune``, and how long the literal algorithm would take for the same widths."""

    literal: Literal
    runs: list[Run]

    def to_json(self) -> dict[str, Any]:
        literal = self.literal
        costs = {
            "nodes": NODES,
            "passes": literal.passes,
            "seconds": {"whole": literal.whole, "smaller": literal.smaller},
        }
        runs = [
            asdict(run)
            | {"scored_per_removal": run.scored_per_removal}
            | {"ratio_whole": literal.whole / run.seconds, "ratio_smaller": literal.smaller / run.seconds}
            for run in self.runs
        ]
        return {"literal": costs | asdict(literal), "runs": runs}

    def __str__(self) -> str:
        literal = self.literal
        lines = [
            f"literal: {literal.passes:,} passes at {NODES} nodes, {duration(literal.whole)}; "
            f"{duration(literal.smaller)} with pruned layers cut out; from {literal.timed} timed passes of either kind",
            _summary(literal, self.runs),
            _groups(literal, self.runs),
        ]
        return "\n\n".join(lines)


def _summary(literal: Literal, runs: Sequence[Run]) -> str:
    header = ["nodes", "time", "literal", "literal, cut", "peak MiB", "scored a removal", "params gone", "loss"]
    lines = [
        [
            str(run.nodes),
            duration(run.seconds),
            f"{literal.whole / run.seconds:.0f}x",
            f"{literal.smaller / run.seconds:.0f}x",
            mebibytes(run.peak),
            f"{run.scored_per_removal:.2f}",
            f"{run.params_removed:.1%}",
            f"{run.loss_before:.3f} -> {run.loss_after:.3f}",
        ]
        for run in runs
    ]
    return table(header, lines)


def _groups(literal: Literal, runs: Sequence[Run]) -> str:
    header = ["group", "removed", "literal"]
    header += [f"{column}, {run.nodes} nodes" for run in runs for column in ("scored a removal", "scoring")]
    lines = []
    for i, cost in enumerate(literal.groups):
        records = [run.history[i] for run in runs]
        line = [cost.group, f"{len(records[0].removed)} of {records[0].size}", duration(cost.passes * cost.whole)]
        for r in records:
            line += [f"{r.neurons_scored / len(r.removed):.2f}", duration(r.seconds_scoring)]
        lines.append(line)
    return table(header, lines)


def measure(subject: Subject, options: Namespace) -> Whole:
    """Prunes once for each of ``options.nodes``; residual streams and the like are left whole."""
    runs = [_run(subject, nodes, options) for nodes in options.nodes]
    (batch,) = subject.batches(1)
    # the widths, and with them the cost, are the same for every number of nodes
    return Whole(extrapolate(subject, batch, runs[0].history), runs)


def _run(subject: Subject, nodes: int, options: Namespace) -> Run:
    source = loader(subject.name, subject.data, subject.size, subject.device)
    prune = partial(
        singe.prune, subject.model, source, options.rho, allocation="uniform", compensate="none",
        criterion=singe.IntegratedGradient(quadrature=singe.GaussLegendre(nodes)), finetune=None, images=subject.size,
        ignore=subject.coupled, seed=options.seed, memory=options.memory, progress=False,
    )  # fmt: skip
    (result, peak), seconds = timed(partial(with_peak, prune, subject.device), subject.device)
    return Run(
        nodes, seconds, peak, result.params_removed, result.macs_removed, result.loss_before, result.loss_after,
        result.history,
    )  # fmt: skip
