"""Where the fading of a group ends: whether its readers get zeros at t = 0, as they do after removal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .groups import Group
from .layer import find_layers
from .riders import find_riders
from .trace import Env, Trace, evaluate


def ends_elsewhere(trace: Trace, group: Group) -> fx.Node | None:
    """The operator that turns neurons faded to zero into other values that their readers get; None where none does.

    Runs the operators between writers and readers for a group that is zero: a sigmoid gives 1/2, but its product with
    the zeros of the same group is zero again. Values from elsewhere are replaced by stand-ins.

    Args:
        trace: of the model.
        group: not frozen.
    """
    read, written = set(group.readers), {layer.output for layer in find_layers(trace, group)}
    riding = {rider.node for rider in find_riders(trace, group, trace.nodes)}
    values: Env = {}  # at t = 0, of the nodes that depend on the group
    for node in trace.nodes:
        own = [i for i in node.all_input_nodes if i in values]
        reads = any(trace.state.get(i) in read for i in node.all_input_nodes)
        left = next((i for i in own if reads and _any(values[i])), None)
        if left is not None:
            return _origin(left, values)
        if node in written:
            values[node] = _like(trace, node, torch.zeros)
        elif own and not reads and not trace.is_size(node):
            # what is added fades with what passes through
            values[node] = values[own[0]] if node in riding else _value(trace, node, values)
    return None


def _value(trace: Trace, node: fx.Node, values: Env) -> Any:
    """The output of an operator where the group is zero.

    Other operands of pointwise operators are arbitrary numbers, which sums with zero keep and products do not; those of
    other operators (a concatenation) are zero, so that only the effect of the group shows.
    """
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())

    def argument(i: fx.Node) -> Any:
        if trace.is_size(i):
            return trace.size(i.meta["val"])
        return values[i] if i in values else _like(trace, i, _numbers if pointwise else torch.zeros)

    return evaluate(node, fx.map_arg(node.args, argument), fx.map_arg(node.kwargs, argument))


def _like(trace: Trace, node: fx.Node, make: Any) -> Any:
    """Tensors of the shapes, dtypes and devices that a node's value has."""

    def tensor(value: Tensor) -> Tensor:
        made: Tensor = make(trace.concrete(value.shape)).to(value.device, value.dtype)
        return made

    return pytree.tree_map_only(Tensor, tensor, node.meta["val"])


def _numbers(shape: list[int]) -> Tensor:
    """Numbers of both signs, or both truth values as conditions; they alternate along the last axis."""
    return torch.arange(torch.Size(shape).numel()).view(shape) % 2 * 2.5 - 2


def _any(value: Any) -> bool:
    return any(bool(v.any()) for v in pytree.tree_leaves(value))


def _origin(node: fx.Node, values: Env) -> fx.Node:
    """The first operator on the way to a value that is not zero."""
    while True:
        earlier = next((i for i in node.all_input_nodes if i in values and _any(values[i])), None)
        if earlier is None:
            return node
        node = earlier
