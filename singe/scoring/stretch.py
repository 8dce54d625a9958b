"""Operators of a suffix as they run for a stack of jobs: what they copy, what they broadcast, what they overwrite."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..graph.nodes import packet_of
from ..graph.operators import CONVOLUTIONS, aten
from ..graph.suffix import Suffix
from ..graph.trace import Trace, evaluate

_IN_PLACE: dict[Any, Any] = {aten.relu.default: aten.relu_.default, aten.add.Tensor: aten.add_.Tensor}
# their gradient does not need their output, and nothing else holds it
_GIVES_AWAY = (*CONVOLUTIONS, aten.linear, aten.batch_norm, aten.add)

_MAX_POOLS = (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d)


@dataclass(frozen=True)
class Stretch:
    """Operators that run in one go.

    Attributes:
        nodes: in execution order.
        sources: where they begin: values that differ from job to job.
        stacked: values from before that are copied for every job.
        shared: the pointwise operators that share a value from before among all jobs, and as which argument.
        overwritten: the operators that work in place, and on which argument.
        identities: operators that return their first argument.
    """

    nodes: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    stacked: tuple[fx.Node, ...]
    shared: dict[fx.Node, int]
    overwritten: dict[fx.Node, int]
    identities: Collection[fx.Node]

    @property
    def constants(self) -> set[Any]:
        """The values from before that all jobs share."""
        return {node.args[index] for node, index in self.shared.items()}

    def evaluate(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], jobs: int) -> Any:
        """A node's value for a stack of jobs."""
        if node in self.identities:
            return args[0]
        if node in self.overwritten:
            return _overwrite(node, args, self.overwritten[node])
        if node in self.shared and jobs > 1:
            stack = 1 - self.shared[node]
            own = args[stack].unflatten(0, (jobs, -1))
            return evaluate(node, tuple(own if i == stack else a for i, a in enumerate(args)), kwargs).flatten(0, 1)
        return evaluate(node, args, kwargs)

    def sizes(self, trace: Trace, batch: int) -> list[int]:
        """Bytes of each value that one job on ``batch`` samples holds, for its gradient or for later operators."""
        new = [n for n in self.nodes if n not in self.overwritten and n not in self.identities]
        indices = [_index_bytes(n, trace.nbytes([n], batch)) for n in new]
        return [trace.nbytes([node], batch) for node in (*self.sources, *self.stacked, *new)] + indices


def stretch(
    trace: Trace,
    suffix: Suffix,
    nodes: Iterable[fx.Node],
    sources: Iterable[fx.Node],
    keep: Collection[fx.Node],
    identities: Collection[fx.Node],
) -> Stretch:
    """The operators ``nodes`` of a suffix, downstream of ``sources``; values in ``keep`` are not overwritten."""
    nodes, sources = tuple(nodes), tuple(sources)
    read = {i for n in nodes for i in n.all_input_nodes} | set(trace.outputs)
    before = [node for node in suffix.boundary if node in read]
    moving = {*nodes, *sources}
    shared = {n: i for n in nodes if (i := _shares(trace, n, before, moving)) is not None}
    whole = {c for c in before if c not in trace.outputs and all(u in shared for u in c.users if u in moving)}
    shared = {n: i for n, i in shared.items() if n.args[i] in whole}
    free = moving - {*sources, *keep, *trace.outputs, *shared}
    overwritten = {n: i for n in nodes if n not in shared and (i := _overwrites(n, free)) is not None}
    return Stretch(nodes, sources, tuple(n for n in before if n not in whole), shared, overwritten, identities)


def _shares(trace: Trace, node: fx.Node, before: Collection[fx.Node], moving: Collection[fx.Node]) -> int | None:
    """Which argument of a pointwise operator on two values of one shape comes from before, if one does."""
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not pointwise or node.kwargs or len(operands) != 2 or list(node.args[:2]) != operands:
        return None
    for index, operand in enumerate(operands):
        other = operands[1 - index]
        if operand in before and other in moving and trace.batch_axes(operand) == [0]:
            return index if _alike(operand, other) else None
    return None


def _overwrites(node: fx.Node, free: Collection[fx.Node]) -> int | None:
    """Which argument a node may overwrite: one that nothing else needs, not even for a gradient."""
    if node.target not in _IN_PLACE or node.kwargs:
        return None
    for index, operand in enumerate(node.args):
        if operand in free and _gives_away(operand) and _alike(operand, node):
            return index
    return None


def _gives_away(operand: Any) -> bool:
    """Whether a node's value is its own and used by nothing but the one operator that reads it."""
    packet = packet_of(operand)
    # of more than two axes, a linear layer's output is a view
    view = packet is aten.linear and len(operand.meta["val"].shape) != 2
    return packet in _GIVES_AWAY and not view and len(operand.users) == 1


def _overwrite(node: fx.Node, args: tuple[Any, ...], index: int) -> Tensor:
    result: Tensor = _IN_PLACE[node.target](args[index], *(a for i, a in enumerate(args) if i != index))
    return result


def _index_bytes(node: fx.Node, size: int) -> int:
    """Bytes that a max pool of ``size`` bytes keeps besides its output: the index of each maximum, in int64."""
    pools = packet_of(node) in _MAX_POOLS
    return size // node.meta["val"].element_size() * 8 if pools else 0


def _alike(a: Any, b: Any) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return bool(one.shape == other.shape and one.dtype == other.dtype)
