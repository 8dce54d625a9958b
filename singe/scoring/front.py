"""The first stretch of a suffix, in which one faded neuron moves the values along one fixed direction.

Where a layer's output z reaches one next layer through operators that work on each channel alone and are positively
homogeneous, f(t z) = t f(z), fading neuron n to t changes the next layer's output by (t - 1) times a constant: the
neuron's contribution to it. This also holds with batch norms folded into the next layer and additions of constants.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import fx

from ..graph.batchnorm import following
from ..graph.layer import Layer
from ..graph.operators import aten
from ..graph.suffix import Suffix
from ..graph.trace import Trace

_POINTWISE = {aten.relu.default, aten.leaky_relu.default, aten.clone.default}
_POOLS = {aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}


@dataclass(frozen=True)
class Front:
    """The stretch, in execution order.

    Attributes:
        chain: homogeneous operators from z to the next layer's input.
        reader: the next layer's call.
        tail: after it, a folded batch norm and additions of constants.
        relu: a relu after these, if one follows.
    """

    chain: tuple[fx.Node, ...]
    reader: fx.Node
    tail: tuple[fx.Node, ...]
    relu: fx.Node | None

    @property
    def end(self) -> fx.Node:
        """The last node whose value moves along a fixed direction."""
        return (self.reader, *self.tail)[-1]

    @property
    def output(self) -> fx.Node:
        """The node that the rest of the suffix reads."""
        return self.relu or self.end

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of it."""
        return (*self.chain, self.reader, *self.tail, *([self.relu] if self.relu else []))


def find_front(trace: Trace, suffix: Suffix, layer: Layer, absorbed: Container[fx.Node]) -> Front | None:
    """The stretch after the suffix's only root, or None where there is none.

    Args:
        trace: of the model.
        suffix: what depends on ``layer``.
        layer: the only one that fades.
        absorbed: batch norms that are folded into the layers before them.
    """
    chain: list[fx.Node] = []
    node, user = layer.output, _only_user(layer.output)
    while user is not None and _on_each_channel(user, node, layer):
        chain.append(user)
        node, user = user, _only_user(user)
    if user is None or not _is_reader(user, node, layer, trace):
        return None
    reader = user
    tail: list[fx.Node] = []
    norm = following(reader)
    if norm is not None and norm in absorbed:
        tail.append(norm)
    node = tail[-1] if tail else reader
    while (user := _only_user(node)) is not None and _adds_constant(user, node, suffix):
        tail.append(user)
        node = user
    relu = user if user is not None and user.target is aten.relu.default else None
    return Front(tuple(chain), reader, tuple(tail), relu)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _on_each_channel(user: fx.Node, node: fx.Node, layer: Layer) -> bool:
    """Whether an operator is homogeneous and works on each of the layer's channels alone."""
    if user.all_input_nodes != [node]:
        return False
    if user.target is aten.mean.dim:
        rank = _rank(node)
        over = {axis % rank for axis in user.args[1] or range(rank)}  # type: ignore[union-attr, operator]
        return not over & {0, layer.axis % rank}
    return user.target in _POINTWISE or (user.target in _POOLS and layer.axis == 1 and _rank(node) == 4)


def _is_reader(user: fx.Node, node: fx.Node, layer: Layer, trace: Trace) -> bool:
    """Whether a layer with weights of the model's own reads all channels of ``node`` into each of its outputs."""
    if user.target not in (aten.linear.default, aten.conv2d.default) or user.kwargs:
        return False
    source, weight, bias = (*user.args, None)[:3]
    if source is not node or weight not in trace.state or (bias is not None and bias not in trace.state):
        return False
    if user.target is aten.linear.default:
        return layer.axis == -1 or _rank(node) == 2
    groups = node.meta["val"].shape[1] // weight.meta["val"].shape[1]  # type: ignore[union-attr]
    return layer.axis == 1 and _rank(node) == 4 and groups == 1


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)


def _adds_constant(user: fx.Node, node: fx.Node, suffix: Suffix) -> bool:
    if user.target is not aten.add.Tensor or user.kwargs or len(user.all_input_nodes) != 2:
        return False
    (other,) = (i for i in user.all_input_nodes if i is not node)
    a, b = node.meta["val"], other.meta["val"]
    return other in suffix.boundary and a.shape == b.shape and a.dtype == b.dtype
