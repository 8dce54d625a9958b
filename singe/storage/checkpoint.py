"""A run that survives being killed: all it needs to resume is in one file; see docs/format.md."""

from __future__ import annotations

import json
import logging
import os
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..digest import digest
from ..graph.trace import named_tensors
from ..models.batches import Batch, tensors
from .files import create_directory, tensor_file, write_tensors
from .progress import Progress

log = logging.getLogger("singe")

FILE = "checkpoint.safetensors"
VERSION = 2

P = TypeVar("P", bound=Progress)


class Checkpoint:
    """The file of one run.

    Args:
        directory: created if it does not exist.
        call: what the run's outcome depends on, as plain data; a file of another call is refused.
    """

    def __init__(self, directory: str | os.PathLike[str], call: Mapping[str, Any]) -> None:
        self._path = create_directory(directory) / FILE
        self._call = json.loads(json.dumps(call))

    def read(self, kind: type[P]) -> P | None:
        """The progress in the file, of the kind that the run has; None where there is no file.

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
            return kind.from_json(data)
        except ValueError as error:
            raise ValueError(f"damaged checkpoint {self._path}: {error}") from error

    def _check_call(self, written: Any) -> None:
        written = written if isinstance(written, dict) else {}
        # as text: the order of rates counts
        other = [key for key, value in self._call.items() if json.dumps(value) != json.dumps(written.get(key))]
        if other:
            names = "; ".join(_difference(key, written.get(key), self._call[key]) for key in other)
            raise ValueError(
                f"expected {self._path} to be of the same call, but {names}; name another directory to start over"
            )

    def restore(self, model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
        """Gives a model that has already been cut, and its optimiser, the values in the file.

        Returns:
            the masks that it holds, by the names of their weights.

        Raises:
            ValueError: they are not of that model.
        """
        with tensor_file(self._path) as file:
            expected, masks = _tensors(model), dict[str, Tensor]()
            for name in sorted(file.names - set(expected)):
                kind, _, rest = name.partition("/")
                key, _, parameter = rest.partition("/")
                if kind == "mask" and (weight := expected.get(f"model/{rest}")) is not None:
                    expected[name] = masks[rest] = torch.empty_like(weight, dtype=torch.bool)
                elif kind == "optimizer" and optimizer and (held := expected.get(f"model/{parameter}")) is not None:
                    value = torch.empty(()) if key == "step" else torch.empty_like(held)  # Adam's, on the CPU
                    expected[name] = optimizer.state[held][key] = value
            file.check(expected)
            file.copy(expected)
        return masks

    def write(
        self,
        progress: Progress,
        model: nn.Module,
        optimizer: Optimizer | None,
        masks: Mapping[str, Tensor],
    ) -> None:
        """Writes the file; the old one stays until the new one is complete.

        Args:
            progress: of the run.
            model: as it is now.
            optimizer: that trains it, if any.
            masks: bool, of the shapes of the weights that they are named after.

        Raises:
            OSError: it cannot be written.
        """
        head = {"format": "singe-checkpoint", "version": VERSION, "call": self._call}
        text = json.dumps(head | progress.to_json(), separators=(",", ":"))
        values = _tensors(model, optimizer) | {f"mask/{name}": mask for name, mask in masks.items()}
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


def _difference(key: str, was: Any, now: Any) -> str:
    """How what a call depends on differs from that of another call, in words."""
    if key == "model":
        return "the model is another: its weights, which of them are trained, or the modes of its modules"
    first, second = map(_cut, _apart(was, now))
    return f"{key} was {first} and is {second}"


def _apart(was: Any, now: Any) -> tuple[str, str]:
    """Two values as text; of two objects of one class only the fields that differ."""
    first, second = (v if isinstance(v, str) else "None" if v is None else json.dumps(v) for v in (was, now))
    fields = [text.removesuffix(")").partition("(")[2].split(", ") for text in (first, second)]
    if first.partition("(")[0] != second.partition("(")[0] or len(fields[0]) != len(fields[1]):
        return first, second
    others = [pair for pair in zip(*fields, strict=True) if pair[0] != pair[1]]
    return ", ".join(a for a, _ in others), ", ".join(b for _, b in others)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:100]}..."
