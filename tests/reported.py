"""Facts of runs that never were, of every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from singe.records import Curve, GroupRecord, LatencyChange, RoundRecord, WeightRecord
from singe.report import Facts
from singe.timing.latency import Latency

CURVES = tuple(Curve(n, (0.5, 1.0), (0.02 * (n + 1), 0.01)) for n in (1, 2))


def group(name: str = "conv1", **changes: Any) -> GroupRecord:
    """Two of four neurons went."""
    record = GroupRecord(
        name, 4, (2, 1), (0.1, 0.2), 7, 0.5, 0.9, 0.6, 1.5, 0.0, 2.5, {}, (0.7, 0.15, 0.1, 0.0), CURVES, 0.93
    )
    return replace(record, **changes)


def neurons(**changes: Any) -> Facts:
    """Of a run on neurons in which everything was measured."""
    facts = Facts(
        model="Net", parameters=(1000, 400), loss=(0.25, 0.5), macs=(9000, 4000), evaluation=(0.95, 0.91),
        latency=LatencyChange(Latency(0.01, 0.009, 0.012, 20), Latency(0.005, 0.0045, 0.006, 20), 8),
        widths={"conv1": (4, 2), "conv2": (4, 2), "head": (10, 10)},
        history=(group(), group("conv2", evaluation=0.9, uncompensated={"head": "no rule"})),
        frozen={"head": "network output", "lstm": "no rule", "gru": "no rule"},
        settings={"rho": "0.5", "criterion": "IntegratedGradient()"}, seconds={"scoring": 3.0, "fine-tuning": 125.0},
    )  # fmt: skip
    return replace(facts, **changes)


def weights(**changes: Any) -> Facts:
    """Of a run on single weights, without evaluation."""
    record = WeightRecord("conv.weight", 100, 40, 0.5, 0.9, 0.6, 1.5, 2.5)
    history = (record, replace(record, weight="head.weight", removed=10))
    return replace(Facts("Net", (230, 180), (0.25, 0.5), weights=(200, 150), history=history), **changes)


def rounds(**changes: Any) -> Facts:
    """Of gradual pruning."""
    first = RoundRecord(21, {"a": (2, 0), "b": (1,)}, {"a": (0.1, 0.2), "b": (0.3,)}, 5, 1.0, 3.0, 0.5, 0.9, 0.8)
    second = replace(first, epoch=42, removed={"a": (1,)}, scores={"a": (0.15,)})
    return neurons(**{"history": (first, second), **changes})


KINDS = {"neurons": neurons, "weights": weights, "rounds": rounds}
