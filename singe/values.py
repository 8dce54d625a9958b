"""Single values are checked before work starts: every check says what was expected and what was given."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from numbers import Real
from pathlib import Path
from typing import Any


def integer(name: str, value: Any, least: int) -> int:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an int for {name}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """Raises TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected a number for {name}, got {type(value).__name__}")
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError unless ``value`` is one of some names."""
    if not (isinstance(value, str) and value in choices):
        *first, last = map(repr, choices)
        raise ValueError(f"expected {name} {', '.join(first)} or {last}, got {value!r}")


def seed(value: int) -> int:
    """A seed of all phases of a run: below 2^40, as a phase takes 20 bits of a generator's 64.

    Raises:
        TypeError: no integer.
        ValueError: out of range.
    """
    if integer("seed", value, 0) >= 2**40:
        raise ValueError(f"expected seed < 2**40, got {value}")
    return value


def positive(name: str, value: Any) -> float:
    """Raises TypeError or ValueError unless ``value`` is a positive real number."""
    if not number(name, value) > 0:
        raise ValueError(f"expected {name} > 0, got {value}")
    return float(value)


def patterns(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a sequence or a set of strings, other than a string."""
    if isinstance(value, (str, bytes)) or not (
        isinstance(value, (Sequence, Set)) and all(isinstance(pattern, str) for pattern in value)
    ):
        raise TypeError(f"expected a list of module names for {name}, got {value!r}")


def fraction(name: str, value: Any) -> float:
    """Raises TypeError or ValueError unless ``value`` is a real number in (0, 1)."""
    if not 0 < number(name, value) < 1:
        raise ValueError(f"expected {name} in (0, 1), got {value!r}")
    return float(value)


def path(name: str, value: Any) -> Path:
    """A path, taken literally.

    Raises:
        TypeError: neither a string nor path-like.
        ValueError: empty.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"expected a path for {name}, got {type(value).__name__}")
    if not os.fspath(value):
        raise ValueError(f"expected a path for {name}, got an empty string")
    return Path(value)
