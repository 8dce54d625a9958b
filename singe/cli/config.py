"""Settings as TOML: read as if they came first on the command line, and written beside a result."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NEVER = ("help", "config", "directory")
"""Options for the command line only."""


def settings(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options that a file may set, by name."""
    return {action.dest: action for action in parser._actions if action.dest not in _NEVER}


def arguments(path: Path, parser: argparse.ArgumentParser, known: set[str]) -> list[str]:
    """A file's settings as arguments of a command; those that only other commands have are ignored.

    Args:
        path: of the file.
        parser: of the command.
        known: the settings of all commands.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not TOML, or a name or value in it is invalid.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a configuration, found none at {path}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected TOML in {path}: {error}") from error
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f", perhaps meant as {near[0]}" if near else ""
            raise ValueError(f"unknown name {name!r} in {path}{hint}")
    own = settings(parser)
    return [word for name, value in values.items() if name in own for word in _words(own[name], value, path)]


def _words(action: argparse.Action, value: Any, path: Path) -> Iterator[str]:
    flag = "--" + action.dest.replace("_", "-")
    if isinstance(value, bool) != (action.nargs == 0):
        kind = "true or false" if action.nargs == 0 else "a value"
        raise ValueError(f"expected {kind} for {action.dest} in {path}, got {json.dumps(value, default=str)}")
    if isinstance(value, (list, dict)) and action.nargs not in ("+", "*"):
        raise ValueError(f"expected a single value for {action.dest} in {path}, got {json.dumps(value, default=str)}")
    if isinstance(value, bool):
        if value or isinstance(action, argparse.BooleanOptionalAction):
            yield flag if value else f"--no-{flag[2:]}"
    elif isinstance(value, dict):
        yield from (flag, *(f"{key}={item}" for key, item in value.items()))
    elif isinstance(value, list):
        yield from (flag, *map(str, value))
    else:
        yield f"{flag}={value}"


def written(values: Mapping[str, Any]) -> str:
    """Settings as TOML that :func:`arguments` reads: strings, numbers, truth values and lists of strings."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf and nan, which JSON writes otherwise
    return json.dumps(value, ensure_ascii=False)
