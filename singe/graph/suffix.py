"""Cutting a trace in two: what runs once, and what depends on the layer that fades."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from .nodes import ancestors
from .trace import Trace


@dataclass(frozen=True)
class Suffix:
    """A trace cut at some nodes.

    Attributes:
        roots: the cut nodes that depend on no other cut node.
        prefix: operators to run once, up to and including the roots.
        nodes: operators that depend on a root and that the output needs, in execution order.
        boundary: values from the prefix, other than the roots, that ``nodes`` read or the model returns.
    """

    roots: tuple[fx.Node, ...]
    prefix: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    boundary: tuple[fx.Node, ...]


def cut(trace: Trace, at: Iterable[fx.Node]) -> Suffix:
    """Splits the operators that the output needs into those before and those after the nodes ``at``.

    The nodes ``at`` are operators, which then run with the prefix, or parameters.
    """
    at = list(at)
    below: set[fx.Node] = set()
    roots: list[fx.Node] = [node for node in at if node in trace.state]
    for node in trace.nodes:
        if any(i in below or i in roots for i in node.all_input_nodes):
            below.add(node)
        elif node in at:
            roots.append(node)
    needed = ancestors(trace.outputs)
    nodes = tuple(n for n in trace.nodes if n in below and n in needed)
    inputs = (i for n in nodes for i in n.all_input_nodes)
    read = dict.fromkeys(i for i in (*inputs, *trace.outputs) if i not in below and i not in roots)
    boundary = tuple(i for i in read if i not in trace.state and i not in trace.constants and not trace.is_size(i))
    before = ancestors([*boundary, *roots])
    prefix = tuple(n for n in trace.nodes if n in before)
    return Suffix(tuple(roots), prefix, nodes, boundary)
