"""Values of a trace that depend on nothing but parameters, buffers and constants."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from .nodes import packet_of
from .operators import CONSTANTS, IDENTITIES, MOVES, VIEWS
from .trace import Trace, evaluate


class Stored:
    """Knows which nodes of a trace hold values stored in the model, as they are or computed from them.

    Args:
        trace: of the model.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._held: set[fx.Node] = {*trace.state, *trace.constants}
        for node in trace.nodes:
            made = packet_of(node) in CONSTANTS and not _draws(node)
            if (made or node.all_input_nodes) and all(i in self._held for i in node.all_input_nodes):
                self._held.add(node)
        # a value that is reached along many ways is visited once
        self.value, self.sources = cache(self._value), cache(self._sources)
        self._is_elementwise = cache(self._elementwise)

    @property
    def nodes(self) -> list[fx.Node]:
        """The operators among them, in execution order."""
        return [node for node in self._trace.nodes if node in self._held]

    def holds(self, node: fx.Node) -> bool:
        """Whether a node's value depends on nothing but what is stored."""
        return node in self._held

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The parameters and buffers that a stored value comes from; none for other values."""
        if node in self._trace.state:
            return [node]
        found = [source for i in node.all_input_nodes for source in self.sources(i)] if self.holds(node) else []
        return list(dict.fromkeys(found))

    def is_computed(self, node: Any) -> bool:
        """Whether a stored value is more than the elements of one parameter or buffer, moved."""
        return isinstance(node, fx.Node) and bool(self.sources(node)) and not self.is_moved(node)

    def is_moved(self, node: fx.Node) -> bool:
        """Whether a node's value is the elements of one parameter, buffer or constant."""
        if node in self._trace.state or node in self._trace.constants or packet_of(node) in CONSTANTS:
            return True
        first: Any = node.args[0] if node.args else None
        moves = packet_of(node) in _KEEP
        return moves and isinstance(first, fx.Node) and self.is_moved(first)

    def vanishes(self, node: fx.Node) -> bool:
        """Whether a stored value is computed element by element, and is zero where all that it is computed from is."""
        if not (self.holds(node) and self._is_elementwise(node)):
            return False
        zeros = {i: torch.zeros(i.meta["val"].shape, dtype=i.meta["val"].dtype) for i in self.sources(node)}
        return not bool(self.run(node, zeros).any())

    def run(self, node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor:
        """A stored value on the CPU, from those of its sources."""
        return run(node, {i: constant.cpu() for i, constant in self._trace.constants.items()} | {**values})

    def _elementwise(self, node: fx.Node) -> bool:
        if self.is_moved(node):
            return True
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        return (pointwise or packet_of(node) in _KEEP) and all(map(self._is_elementwise, node.all_input_nodes))

    def _value(self, node: fx.Node) -> Tensor | None:
        """The value of a node that depends on no weights or inputs, such as an index; None for other nodes."""
        if node in self._trace.integers:
            return self._trace.integers[node].cpu()
        packet = packet_of(node)
        if node.op != "call_function" or not (node.all_input_nodes or packet in CONSTANTS):
            return None
        if _draws(node):
            return None
        known: dict[fx.Node, Any] = {}
        for i in node.all_input_nodes:
            known[i] = self._trace.size(i.meta["val"]) if self._trace.is_size(i) else self.value(i)
        if any(value is None for value in known.values()):
            return None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
        result = evaluate(node, args, {name: value for name, value in kwargs.items() if name != "device"})
        return result if isinstance(result, Tensor) else None


def _draws(node: fx.Node) -> bool:
    """Whether an operator draws at random."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def run(node: fx.Node, values: Mapping[fx.Node, Tensor]) -> Tensor:
    """The value of a stored node from those of the nodes that it is computed from."""
    known: dict[fx.Node, Tensor] = {**values}

    def of(i: fx.Node) -> Tensor:
        if i not in known:
            known[i] = evaluate(i, *fx.map_arg((i.args, dict(i.kwargs)), of))
        return known[i]

    return of(node)


_KEEP = {*MOVES, *IDENTITIES, *VIEWS, torch.ops.aten.index}
