"""A run that survives being killed: all it needs to resume after its last group is in one file; see docs/format.md."""

from __future__ import annotations

import json
import logging
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import typed
from ..digest import digest
from ..graph.trace import named_tensors
from ..models.batches import Batch, tensors
from ..records import GroupRecord
from ..removal.plan import Plan
from .files import create_directory, tensor_file, write_tensors

log = logging.getLogger("singe")

FILE = "checkpoint.safetensors"
VERSION = 1

_READERS = {
    "memory": typed.reader(int),
    "samples": typed.reader(str),
    "counts": typed.reader(tuple[tuple[str, int, int], ...]),
    "plan": lambda data, at: Plan.from_json(data),
    "history": typed.reader(tuple[GroupRecord, ...]),
    "traced": typed.reader(int),
    "tuned": typed.reader(int),
    "tuned_parts": typed.reader(int),
    "uncompensated": typed.reader(dict[str, str]),
    "seconds": typed.reader(dict[str, float]),
}
"""Of the fields of :class:`Progress`."""


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        memory: bytes that a scoring pass may take, lowered where the device had no room for more.
        samples: the fingerprint of the loader's first ones.
        counts: (name, neurons before, neurons to remove) of every group that loses some, in order.
        plan: what was removed.
        history: of the groups that are done.
        traced: how many groups were done when the graph in use was exported.
        tuned: how many steps of the fine-tuning after all groups are done.
        tuned_parts: in how many parts, each of which began with its own seed.
        uncompensated: the layers that were not refitted before that -> why.
        seconds: time spent outside the groups, by activity.
    """

    memory: int
    samples: str
    counts: list[tuple[str, int, int]] = field(default_factory=list)
    plan: Plan = field(default_factory=Plan)
    history: list[GroupRecord] = field(default_factory=list)
    traced: int = 0
    tuned: int = 0
    tuned_parts: int = 0
    uncompensated: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def neurons(self) -> int:
        """How many have been removed."""
        return sum(len(record.removed) for record in self.history)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json``; see :meth:`from_json`."""
        data = {name: value for name, value in vars(self).items() if name not in ("plan", "history")}
        return data | {"plan": self.plan.to_json(), "history": [asdict(record) for record in self.history]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Progress:
        """The progress that :meth:`to_json` wrote.

        Raises:
            ValueError: something in it is of the wrong type, or contradicts the rest.
        """
        try:
            found = {name: read(data[name], name) for name, read in _READERS.items()}
        except (KeyError, ValueError) as error:
            raise ValueError(f"damaged progress: {error!r:.200}") from error
        progress = cls(**found | {name: list(found[name]) for name in ("counts", "history")})
        counts, history, plan = progress.counts, progress.history, progress.plan
        removed = [(r.group, r.size, len(r.neurons), r.neurons) for r in plan.removals]
        if removed != [(*c, r.removed) for c, r in zip(counts, history, strict=False)] or len(removed) < len(history):
            raise ValueError("damaged progress: what was removed is not what was to be")
        sensible = all(0 < count < size for _, size, count in counts)
        sensible &= progress.tuned_parts <= progress.tuned * (len(history) == len(counts))
        if not (progress.memory and progress.traced <= len(history) and sensible):
            raise ValueError("damaged progress: numbers out of range")
        return progress


class Checkpoint:
    """The file of one run.

    Args:
        directory: created if it does not exist.
        call: what the run's outcome depends on, as plain data; a file of another call is refused.
    """

    def __init__(self, directory: str | os.PathLike[str], call: Mapping[str, Any]) -> None:
        self._path = create_directory(directory) / FILE
        self._call = json.loads(json.dumps(call))

    def read(self) -> Progress | None:
        """The progress in the file, None where there is no file.

        Raises:
            ValueError: it is damaged, of another version, or of another call.
        """
        if not self._path.exists():
            return None
        with tensor_file(self._path) as file:
            text = file.metadata.get("singe", "")
            try:
                data = json.loads(text)
                version = data["version"] if data["format"] == "singe-checkpoint" else None
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                raise ValueError(f"expected a checkpoint of singe.prune in {self._path}, got another file") from error
            if version != VERSION:
                found = reprlib.repr(version)
                raise ValueError(f"expected a checkpoint of version {VERSION} in {self._path}, got version {found}")
            if file.digest(text) != file.metadata.get("digest"):
                raise ValueError(f"damaged checkpoint {self._path}: its contents are not those that were written")
        self._check_call(data.get("call"))
        try:
            return Progress.from_json(data)
        except ValueError as error:
            raise ValueError(f"damaged checkpoint {self._path}: {error}") from error

    def _check_call(self, written: Any) -> None:
        written = written if isinstance(written, dict) else {}
        # as text: the order of rates counts
        other = [key for key, value in self._call.items() if json.dumps(value) != json.dumps(written.get(key))]
        if other:
            names = "; ".join(f"{key} was {_shown(written.get(key))} and is {_shown(self._call[key])}" for key in other)
            raise ValueError(
                f"expected {self._path} to be of the same call, but {names}; name another directory to start over"
            )

    def restore(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Gives a model that has already been cut, and its optimiser, the values in the file.

        Raises:
            ValueError: they are not of that model.
        """
        with tensor_file(self._path) as file:
            expected = _tensors(model)
            for name in sorted(file.names - set(expected)):
                key, _, parameter = name.removeprefix("optimizer/").partition("/")
                held = expected.get(f"model/{parameter}")
                if optimizer is not None and held is not None:
                    value = torch.empty(()) if key == "step" else torch.empty_like(held)  # Adam's, on the CPU
                    expected[name] = optimizer.state[held][key] = value
            file.check(expected)
            file.copy(expected)

    def write(self, progress: Progress, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Writes the file; the old one stays until the new one is complete.

        Raises:
            OSError: it cannot be written.
        """
        head = {"format": "singe-checkpoint", "version": VERSION, "call": self._call}
        text = json.dumps(head | progress.to_json(), separators=(",", ":"))
        values = _tensors(model, optimizer)
        write_tensors(self._path, values, {"singe": text, "digest": digest(text, values)})


def fingerprint(batch: Batch, length: int) -> str:
    """Of a batch's tensors, and of the length of the loader's own batches."""
    return digest(str(length), {str(index): tensor for index, tensor in enumerate(tensors(batch))})


def _tensors(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """All tensors of the model, tied ones under their first name, and the optimiser's state for each."""
    names: dict[Tensor, str] = {}
    for name, tensor in named_tensors(model).items():
        names.setdefault(tensor, name)
    found = {f"model/{name}": tensor for tensor, name in names.items()}
    for parameter, state in optimizer.state.items() if optimizer is not None else ():
        kept = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        found |= {f"optimizer/{key}/{names[parameter]}": value for key, value in kept.items()}
    return found


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else "None" if value is None else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
