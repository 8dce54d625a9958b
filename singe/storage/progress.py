"""How far a run has come, as plain data that another process can continue from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from .. import typed
from ..records import GroupRecord, WeightRecord
from ..removal.plan import Plan

if TYPE_CHECKING:
    from typing_extensions import Self  # torch brings it

_READERS: dict[str, typed.Reader] = {
    "memory": typed.reader(int),
    "samples": typed.reader(str),
    "counts": typed.reader(tuple[tuple[str, int, int], ...]),
    "plan": lambda data, at: Plan.from_json(data),
    "traced": typed.reader(int),
    "tuned": typed.reader(int),
    "tuned_parts": typed.reader(int),
    "uncompensated": typed.reader(dict[str, str]),
    "seconds": typed.reader(dict[str, float]),
}
"""Of all fields but the history."""

_HISTORIES: dict[type, typed.Reader] = {
    GroupRecord: typed.reader(tuple[GroupRecord, ...]),
    WeightRecord: typed.reader(tuple[WeightRecord, ...]),
}
"""By the kind of its records."""


@dataclass
class Progress(ABC):
    """Of runs of either kind.

    Attributes:
        memory: bytes that a scoring pass may take, lowered where the device had no room for more.
        samples: the fingerprint of the loader's first ones.
        counts: (name, size before, how many to remove) of every group, or weight tensor, that loses some, in order.
        history: of those that are done.
        tuned: how many steps of the fine-tuning after all of them are done.
        tuned_parts: in how many parts, each of which began with its own seed.
        seconds: time spent outside of them, by activity.
    """

    memory: int
    samples: str
    counts: list[tuple[str, int, int]] = field(default_factory=list)
    history: list[Any] = field(default_factory=list)
    tuned: int = 0
    tuned_parts: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    record: ClassVar[type]
    """Of what the history consists."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json``; see :meth:`from_json`."""
        return vars(self) | {"history": [asdict(record) for record in self.history]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The progress that :meth:`to_json` wrote.

        Raises:
            ValueError: something in it is of the wrong type, or contradicts the rest.
        """
        readers = _READERS | {"history": _HISTORIES[cls.record]}
        try:
            found = {name: readers[name](data[name], name) for name in (f.name for f in fields(cls))}
        except (KeyError, ValueError) as error:
            raise ValueError(f"damaged progress: {error!r:.200}") from error
        progress = cls(**found | {name: list(found[name]) for name in ("counts", "history")})
        if reason := progress.contradiction():
            raise ValueError(f"damaged progress: {reason}")
        return progress

    @abstractmethod
    def counted(self) -> list[tuple[str, int, int]]:
        """The counts by the history."""

    def contradiction(self) -> str:
        """What contradicts the rest; empty if nothing does."""
        if self.counted() != self.counts[: len(self.history)]:
            return "what was removed is not what was to be"
        if not self.memory or not all(0 < count < size for _, size, count in self.counts):
            return "numbers out of range"
        if self.tuned and len(self.history) < len(self.counts):
            return "it was trained too early"
        in_parts = bool(self.tuned) == bool(self.tuned_parts) and self.tuned_parts <= self.tuned
        return "" if in_parts else "it was trained in parts without steps"


@dataclass
class NeuronProgress(Progress):
    """Of a run on neurons.

    Attributes:
        plan: what was removed.
        traced: how many groups were done when the graph in use was exported.
        uncompensated: the layers that were not refitted after all groups -> why.
    """

    plan: Plan = field(default_factory=Plan)
    traced: int = 0
    uncompensated: dict[str, str] = field(default_factory=dict)

    record = GroupRecord

    @property
    def neurons(self) -> int:
        """How many have been removed."""
        return sum(len(record.removed) for record in self.history)

    def to_json(self) -> dict[str, Any]:
        """With the plan."""
        return super().to_json() | {"plan": self.plan.to_json()}

    def counted(self) -> list[tuple[str, int, int]]:
        """By the history."""
        return [(record.group, record.size, len(record.removed)) for record in self.history]

    def contradiction(self) -> str:
        """In the plan, too, and in the graph that was in use."""
        planned = [(removal.group, removal.size, removal.neurons) for removal in self.plan.removals]
        if planned != [(record.group, record.size, record.removed) for record in self.history]:
            return "the plan is not what was removed"
        return "the graph is of later" if self.traced > len(self.history) else super().contradiction()


@dataclass
class WeightProgress(Progress):
    """Of a run on single weights, whose masks are tensors of the checkpoint."""

    record = WeightRecord

    def counted(self) -> list[tuple[str, int, int]]:
        """By the history."""
        return [(record.weight, record.size, record.removed) for record in self.history]
