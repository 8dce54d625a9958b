"""Modules and groups by name."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from .graph.groups import Group
from .wrappers import remark_on


def named_groups(model: nn.Module, groups: Iterable[Group], pattern: str, argument: str) -> set[str]:
    """Names of the groups with a member that a pattern names.

    Args:
        model: whose modules the pattern names.
        groups: of that model.
        pattern: a module's or group's name or a glob over them; a module stands for all inside it too.
        argument: where the pattern came from, for the message.

    Raises:
        ValueError: the pattern names nothing.
    """
    modules = [name for name, _ in model.named_modules() if name]
    found = [m for m in modules if fnmatchcase(m, pattern)]
    groups = list(groups)
    by_name = {g.name for g in groups if fnmatchcase(g.name, pattern)}
    if not found and not by_name:
        raise ValueError(
            f"expected module names or patterns that match one in {argument}, got {pattern!r}{remark_on(pattern)}"
        )
    inside = {m for m in modules if any(m == f or m.startswith(f"{f}.") for f in found)}
    return by_name | {g.name for g in groups if inside.intersection(g.members)}
