"""Dataclasses as plain data for JSON, and back: what is read is checked against their annotations."""

from __future__ import annotations

import math
import reprlib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any


def plain(value: Any) -> Any:
    """A dataclass, or what fields of one hold, as ``json`` writes it; numbers that JSON does not have become None."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(kind: Any, value: Any, at: str = "") -> Any:
    """A value of a kind from plain data.

    Args:
        kind: a dataclass, or what its fields may be annotated with here: str, bool, int (a number of things, so not
            below 0), float (NaN where the data has None), ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]`` and
            unions of such, of which the first that fits is taken.
        value: as ``json`` reads it.
        at: where that stands, for messages.

    Raises:
        ValueError: it is not of that kind; says where.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        return _dataclass(kind, value, at)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _one_of(inner, value, at)
    if origin is dict:
        return {key: read(inner[1], item, f"{at}[{key!r:.40}]") for key, item in _of(dict, value, at).items()}
    if origin is tuple:
        items = _of(list, value, at)
        kinds = [inner[0]] * len(items) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(items):
            raise ValueError(f"expected {len(kinds)} entries at {at}, got {len(items)}")
        return tuple([read(k, item, f"{at}[{i}]") for i, (k, item) in enumerate(zip(kinds, items, strict=True))])
    if kind is float:
        return _float(value, at)
    found = _of(kind, value, at)
    if kind is int and not 0 <= found < 2**63:
        raise ValueError(f"expected a number of things at {at}, got {reprlib.repr(found)}")
    return found


def _one_of(kinds: tuple[Any, ...], value: Any, at: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    errors = []
    for kind in kinds:
        try:
            return read(kind, value, at)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _dataclass(kind: type, value: Any, at: str) -> Any:
    known, kinds = {field.name: field for field in fields(kind)}, _annotations(kind)
    data = _of(dict, value, at)
    needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - set(data)):
        raise ValueError(f"expected {missing[0]} at {at or 'the top'}, got nothing of that name")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"expected no {reprlib.repr(unknown[0])} at {at or 'the top'}")
    return kind(**{name: read(kinds[name], item, f"{at}.{name}".lstrip(".")) for name, item in data.items()})


@cache
def _annotations(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _of(kind: type, value: Any, at: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__} at {at or 'the top'}, got {reprlib.repr(value)}")
    return value


def _float(value: Any, at: str) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float):
        raise ValueError(f"expected a number at {at}, got {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"expected a number at {at}, got one of {value.bit_length()} bits") from error
