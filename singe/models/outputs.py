"""Outputs of networks: tensors in any container, including dataclasses and mappings of the user's own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

KeyPath = tuple[str, ...]
"""The keys, indices and names of fields that lead to a part of something nested."""


class Form:
    """How outputs are nested, without the values they hold.

    It handles dataclasses, which are rebuilt from their fields, whatever torch's pytree knows, and other mappings,
    which are rebuilt from their items.

    Args:
        outputs: of a network.
    """

    def __init__(self, outputs: Any) -> None:
        parts, self._spec = pytree.tree_flatten(outputs, is_leaf=_is_dataclass)
        self._parts = [None if (held := _held(part)) is None else _Part(part, held) for part in parts]

    def build(self, values: Iterable[Any]) -> Any:
        """Outputs of this form.

        Args:
            values: what :func:`leaves` finds in them, in that order.
        """
        return self._build(iter(values))

    def _build(self, values: Iterator[Any]) -> Any:
        parts = [next(values) if part is None else part.make(part.form._build(values)) for part in self._parts]
        return pytree.tree_unflatten(parts, self._spec)


class _Part:
    """A dataclass or a mapping, by the form of its contents."""

    def __init__(self, part: Any, held: dict[Any, Any]) -> None:
        kind: Callable[..., Any] = type(part)
        self.make = (lambda fields: kind(**fields)) if _is_dataclass(part) else kind
        self.form = Form(held)


def leaves(outputs: Any) -> list[Any]:
    """The values in outputs, tensors and others, in a fixed order."""
    return [leaf for _, leaf in with_paths(outputs)]


def cloned(outputs: Any) -> Any:
    """The same with clones of all tensors, through which gradients pass; objects are copied, not made anew."""

    def one(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.clone()
        if _is_dataclass(part):
            own = copy.copy(part)
            for name in (field.name for field in dataclasses.fields(part) if hasattr(part, field.name)):
                object.__setattr__(own, name, cloned(getattr(part, name)))  # also if it is frozen
            return own
        if isinstance(part, MutableMapping):
            own = copy.copy(part)
            own.update({key: cloned(value) for key, value in part.items()})
            return own
        return part

    return pytree.tree_map(one, outputs)


def with_paths(outputs: Any) -> list[tuple[KeyPath, Any]]:
    """The values in outputs, in the order of :func:`leaves`, each with the path to it."""
    found: list[tuple[KeyPath, Any]] = []
    for keys, part in pytree.tree_flatten_with_path(outputs, is_leaf=_is_dataclass)[0]:
        path, held = tuple(map(_word, keys)), _held(part)
        found += [(path, part)] if held is None else [((*path, *inner), leaf) for inner, leaf in with_paths(held)]
    return found


def _is_dataclass(part: Any) -> bool:
    return dataclasses.is_dataclass(part) and not isinstance(part, type)


def _held(part: Any) -> dict[Any, Any] | None:
    """The fields of a dataclass, the items of a mapping, or None for anything else."""
    if _is_dataclass(part):
        return {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if field.init}
    return dict(part) if isinstance(part, Mapping) else None


def _word(key: pytree.KeyEntry) -> str:
    match key:
        case pytree.MappingKey():
            return str(key.key)
        case pytree.SequenceKey():
            return str(key.idx)
        case pytree.GetAttrKey():
            return key.name
    return str(key)
