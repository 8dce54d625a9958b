"""All of a result but its model and its plan or masks; as ``report.json`` beside them, see docs/format.md."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import typed, values
from ..digest import digest
from ..records import GroupRecord, LatencyChange, Record, RoundRecord, WeightRecord
from ..storage.files import read_text, replace, tensor_file
from ..storage.saved import MASKS_FILE, PLAN_FILE

FILE = "report.json"
VERSION = 1


@dataclass(frozen=True)
class Facts:
    """The contents of a report; pairs are before and after.

    Attributes:
        model: its class.
        parameters: their number; with single weights masked, those that are not masked.
        loss: on one batch of calibration samples.
        macs: multiply-adds for one sample; None where they do not change.
        weights: single weights of convolutions and linear layers, where single ones are masked.
        evaluation: what ``evaluate`` returned.
        latency: of a forward pass, where it was measured.
        widths: layer -> output channels.
        history: records of one kind.
        frozen: what was left whole -> why.
        uncompensated: layers that could not be refitted when all were -> why.
        settings: of the run, as text.
        seconds: activity -> the time it took.
    """

    model: str
    parameters: tuple[int, int]
    loss: tuple[float, float]
    macs: tuple[int, int] | None = None
    weights: tuple[int, int] | None = None
    evaluation: tuple[float | None, float | None] = (None, None)
    latency: LatencyChange | None = None
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    history: tuple[Record, ...] = ()
    frozen: dict[str, str] = field(default_factory=dict)
    uncompensated: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def groups(self) -> list[GroupRecord]:
        """The records of groups of neurons."""
        return [record for record in self.history if isinstance(record, GroupRecord)]

    @property
    def tensors(self) -> list[WeightRecord]:
        """The records of weight tensors."""
        return [record for record in self.history if isinstance(record, WeightRecord)]

    @property
    def rounds(self) -> list[RoundRecord]:
        """The records of rounds of gradual pruning."""
        return [record for record in self.history if isinstance(record, RoundRecord)]


_read = typed.reader(Facts)


def save(facts: Facts, directory: str | os.PathLike[str]) -> None:
    """Writes ``report.json`` beside the plan or the masks that it belongs to."""
    path = Path(directory)
    head = {"format": "singe-report", "version": VERSION, "of": _beside(path)}
    text = json.dumps(head | typed.as_data(facts), separators=(",", ":"), allow_nan=False)
    replace(path / FILE, lambda part: part.write_text(text, encoding="utf-8"))


def load(directory: str | os.PathLike[str]) -> Facts:
    """What :func:`save` wrote.

    Raises:
        FileNotFoundError: there is no ``report.json``.
        ValueError: it is damaged, of another version, or not of the plan or masks beside it.
    """
    path = values.path("directory", directory)
    if not (path / FILE).exists():
        raise FileNotFoundError(
            f"expected {path / FILE}, which result.save(directory) writes, got no such file; directories that older "
            "versions saved have none"
        )
    try:
        data: Any = json.loads(read_text(path / FILE))
        if not isinstance(data, dict) or data.pop("format", None) != "singe-report":
            raise ValueError("expected a JSON object with format 'singe-report'")
        if (version := data.pop("version", None)) != VERSION:
            raise ValueError(f"expected version {VERSION}, got version {version!r:.40}")
        of = data.pop("of", None)
        facts: Facts = _read(data, "")
        _check(facts)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged report in {path / FILE}: {error}") from error
    if of != _beside(path):
        raise ValueError(f"expected {path / FILE} to be of the plan or the masks beside it, it was saved with others")
    return facts


def _beside(path: Path) -> str:
    """The digest of what was removed: of the plan, else of the masks."""
    if (path / MASKS_FILE).exists():
        with tensor_file(path / MASKS_FILE) as file:
            return file.digest("")
    return digest(read_text(path / PLAN_FILE), {})


def _check(facts: Facts) -> None:
    """Raises ValueError for numbers that contradict each other."""
    pairs = {"parameters": facts.parameters, "macs": facts.macs, "weights": facts.weights}
    pairs |= {f"widths of {name:.40}": pair for name, pair in facts.widths.items()}
    for name, pair in pairs.items():
        if pair is not None and pair[1] > pair[0]:
            raise ValueError(f"expected no more {name} after pruning than before, got {pair}")
    if not facts.parameters[0]:
        raise ValueError("expected parameters, got none")
    for latency in (facts.latency.before, facts.latency.after) if facts.latency is not None else ():
        if not 1e-12 < latency.lower <= latency.median <= latency.upper < 1e12:
            raise ValueError(f"expected times that ascend, got {latency}")
    if any(not 0 <= s < 1e12 for s in facts.seconds.values()):
        raise ValueError(f"expected seconds, got {facts.seconds}")
    if len({type(record) for record in facts.history}) > 1:
        raise ValueError("expected records of one kind")
    for record in facts.history:
        if not _is_sound(record):
            raise ValueError(f"expected a record whose numbers fit together, got {record!r:.200}")


def _is_sound(record: Record) -> bool:
    if isinstance(record, WeightRecord):
        return 0 < record.removed <= record.size
    if isinstance(record, RoundRecord):
        fits = [len(neurons) == len(record.scores.get(name, ())) for name, neurons in record.removed.items()]
        return (
            all(fits)
            and record.removed.keys() == record.scores.keys()
            and all(map(_different, record.removed.values()))
        )
    points = [len(c.t) == len(c.norms) and all(0 < t <= 1 for t in c.t) for c in record.curves]
    return (
        len(record.removed) == len(record.scores) < record.size
        and _different(record.removed)
        and all(neuron < record.size for neuron in (*record.removed, *(c.neuron for c in record.curves)))
        and len(record.first_scores) in (0, record.size)
        and all(points)
    )


def _different(neurons: Collection[int]) -> bool:
    return len(set(neurons)) == len(neurons)
