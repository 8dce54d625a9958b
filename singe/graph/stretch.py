"""Operators of a suffix as they run for a stack of jobs: what they copy, what they broadcast, what they overwrite."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .suffix import Suffix
from .trace import CONVOLUTIONS, Trace, aten, evaluate

_IN_PLACE: dict[Any, Any] = {aten.relu.default: aten.relu_.default, aten.add.Tensor: aten.add_.Tensor}
# their gradient does not need what they put out, and nobody else holds it
_GIVES_AWAY = (*CONVOLUTIONS, aten.linear, aten.batch_norm, aten.add)


@dataclass(frozen=True)
class Stretch:
    """Operators that run in one go.

    Attributes:
        nodes: in execution order.
        sources: where they begin: values that differ from job to job.
        stacked: values from before that are copied for every job.
        shared: the pointwise operators that take a value from before for all jobs at once, and as which argument.
        overwritten: the operators that work in place, and on which argument.
        identities: operators that hand on their first argument.
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
        """Bytes of each value that one job on ``batch`` samples holds."""
        new = (n for n in self.nodes if n not in self.overwritten and n not in self.identities)
        held = (*self.sources, *self.stacked, *new)
        return [trace.nbytes([node], batch) for node in held]


def stretch(
    trace: Trace,
    suffix: Suffix,
    nodes: Iterable[fx.Node],
    sources: Iterable[fx.Node],
    keep: Collection[fx.Node],
    identities: Collection[fx.Node],
) -> Stretch:
    """The operators ``nodes`` of a suffix behind ``sources``; the values in ``keep`` are not overwritten."""
    nodes, sources = tuple(nodes), tuple(sources)
    read = {i for n in nodes for i in n.all_input_nodes} | set(trace.outputs)
    before = [node for node in suffix.boundary if node in read]
    moving = {*nodes, *sources}
    shared = {n: i for n in nodes if (i := _shares(trace, n, before, moving)) is not None}
    whole = {c for c in before if c not in trace.outputs and all(u in shared for u in c.users if u in moving)}
    shared = {n: i for n, i in shared.items() if n.args[i] in whole}
    kept = {*keep, *trace.outputs}
    overwritten = {
        n: i for n in nodes if n not in shared and (i := _overwrites(n, moving - {*sources, *kept})) is not None
    }
    return Stretch(nodes, sources, tuple(n for n in before if n not in whole), shared, overwritten, identities)


def _shares(trace: Trace, node: fx.Node, before: Collection[fx.Node], moving: Collection[fx.Node]) -> int | None:
    """Which argument of a pointwise operator on two values of one shape comes from before, if one does."""
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or len(node.all_input_nodes) != 2:
        return None
    for index, operand in enumerate(node.args[:2]):
        other = node.args[1 - index]
        if operand in before and other in moving and trace.batch_axes(operand) == [0]:  # type: ignore[arg-type]
            return index if _alike(operand, other) else None
    return None


def _overwrites(node: fx.Node, free: Collection[fx.Node]) -> int | None:
    """Which argument a node may work in place on: one that nobody else needs, not even for a gradient."""
    if node.target not in _IN_PLACE or node.kwargs:
        return None
    for index, operand in enumerate(node.args):
        fresh = getattr(getattr(operand, "target", None), "overloadpacket", None) in _GIVES_AWAY
        if operand in free and fresh and len(operand.users) == 1 and _alike(operand, node):  # type: ignore[union-attr]
            return index
    return None


def _overwrite(node: fx.Node, args: tuple[Any, ...], index: int) -> Tensor:
    result: Tensor = _IN_PLACE[node.target](args[index], *(a for i, a in enumerate(args) if i != index))
    return result


def _alike(a: Any, b: Any) -> bool:
    one, other = a.meta["val"], b.meta["val"]
    return bool(one.shape == other.shape and one.dtype == other.dtype)
