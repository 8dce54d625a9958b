"""Questions about a node of an exported graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

MODEL = "model"
"""The name under which the exported module holds the user's model."""


def packet_of(node: fx.Node) -> Any:
    """All overloads of a node's operator as one; None for plain Python functions."""
    return getattr(node.target, "overloadpacket", None)


def argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    """An argument of a node by position or name."""
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def place_of(node: fx.Node) -> str:
    """Name of the innermost module that a node stands in; empty for the model itself."""
    name, _ = _innermost(node)
    return "" if name == MODEL else name.removeprefix(f"{MODEL}.").partition("@")[0]


def kind_of(node: fx.Node) -> str:
    """Name of the class of the innermost module that a node stands in."""
    return _innermost(node)[1].rpartition(".")[2]


def described(node: fx.Node) -> str:
    """The operator and its place in the model, for reasons shown to the user."""
    place = place_of(node)
    return f"{node.target} in {place}" if place else str(node.target)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything they are computed from."""
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def selectors(node: fx.Node) -> list[fx.Node]:
    """The values that decide which samples a node sees, such as those that reach an expert; none where it sees all.

    Of what the first nodes on the way to it are computed from whose sizes follow from values, those that are no
    floating-point numbers; these count only where there are no others.
    """
    found: dict[fx.Node, None] = {}
    seen, stack = {node}, [node] if _sized_by_values(node) else []
    while stack:
        for before in stack.pop().all_input_nodes:
            if _sized_by_values(before) and before not in seen:
                seen.add(before)
                stack.append(before)
            elif not _sized_by_values(before) and isinstance(before.meta.get("val"), Tensor):
                found[before] = None
    exact = [before for before in found if not before.meta["val"].is_floating_point()]
    return exact or list(found)


def _sized_by_values(node: fx.Node) -> bool:
    return "val" in node.meta and bool(free_unbacked_symbols(node.meta["val"]))


def _innermost(node: fx.Node) -> tuple[str, str]:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name, kind = stack[-1] if stack else ("", "")
    return name, kind if isinstance(kind, str) else kind.__name__
