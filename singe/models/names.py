"""Modules by name."""

from __future__ import annotations

from torch import nn

from .wrappers import remark_on


def first_name(model: nn.Module, name: str) -> str:
    """The first name of the module that goes by a name.

    Raises:
        ValueError: there is no such module.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(name, str) or name not in known:
        remark = remark_on(name) if isinstance(name, str) else ""
        raise ValueError(f"expected the name of a module of {type(model).__name__}, got {name!r}{remark}")
    return next(first for first, module in known.items() if module is known[name])
