"""The parts of a network that lose neurons or single weights, and how they are named."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn

from ..models.wrappers import remark_on


class Part(Protocol):
    """A unit of pruning: a group of neurons, or a weight."""

    @property
    def name(self) -> str:
        """Unique among the parts."""

    @property
    def size(self) -> int:
        """How many units it has: neurons, or single weights."""

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the modules that it belongs to."""

    @property
    def writers(self) -> tuple[str, ...]:
        """Names of its weights, in execution order."""


def named_parts(model: nn.Module, parts: Iterable[Part], pattern: str, argument: str) -> set[str]:
    """Names of the parts with a member that a pattern names.

    Args:
        model: whose modules the pattern names.
        parts: of that model.
        pattern: a module's or part's name or a glob over them; a module stands for all inside it too.
        argument: where the pattern came from, for the message.

    Raises:
        ValueError: the pattern names nothing.
    """
    modules = [name for name, _ in model.named_modules() if name]
    aliases = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    first = {module: name for name, module in reversed(aliases)}
    found = list(dict.fromkeys(first[module] for name, module in aliases if _names(pattern, name)))
    parts = list(parts)
    by_name = {p.name for p in parts if _names(pattern, p.name)}
    if not found and not by_name:
        raise ValueError(
            f"expected module names or patterns that match one in {argument}, got {pattern!r}{remark_on(pattern)}"
        )
    inside = {m for m in modules if any(m == f or m.startswith(f"{f}.") for f in found)}
    return by_name | {p.name for p in parts if inside.intersection(p.members)}


def _names(pattern: str, name: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)  # brackets in a name are not meant as a glob's
