"""What each ATen operator does to the channels of its inputs (see channels.py): only linear ones pass them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph.groups import module_of
from ..graph.mirrors import along
from ..graph.nodes import argument, described, packet_of
from ..graph.operators import CONVOLUTIONS, TRANSPOSED, aten
from ..graph.trace import Env, Trace, evaluate
from .channels import ZERO, AffineLayer, Channels

_CONVOLUTIONS = (*CONVOLUTIONS, *TRANSPOSED)

# run on the channels as they are
_MOVES = {
    aten.view, aten._unsafe_view, aten.permute, aten.transpose, aten.t, aten.squeeze, aten.unsqueeze, aten.slice,
    aten.select, aten.expand, aten.repeat, aten.flip, aten.roll, aten.cat, aten.stack, aten.unbind, aten.split,
    aten.split_with_sizes, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle,
}  # fmt: skip
# leave every element in place, and its dtype unless they take one
_IDENTITIES = {aten.clone, aten.alias, aten.detach, aten._to_copy}
# average over windows of trailing axes, with weights that add up to one; the value is the number of those axes
_AVERAGES = {
    aten.avg_pool1d: 1, aten.avg_pool2d: 2, aten.avg_pool3d: 3, aten.adaptive_avg_pool1d: 1,
    aten.adaptive_avg_pool2d: 2, aten.adaptive_avg_pool3d: 3, aten.upsample_nearest1d: 1, aten.upsample_nearest2d: 2,
    aten.upsample_nearest3d: 3, aten._upsample_nearest_exact1d: 1, aten._upsample_nearest_exact2d: 2,
    aten._upsample_nearest_exact3d: 3, aten.upsample_linear1d: 1, aten.upsample_bilinear2d: 2,
    aten.upsample_trilinear3d: 3,
}  # fmt: skip
_POOLS = {aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d}
_ZEROS = {aten.zeros, aten.new_zeros, aten.zeros_like}


def find_channels(trace: Trace, unable: Mapping[fx.Node, str]) -> Channels:
    """Runs the graph on channels.

    Args:
        trace: of the model.
        unable: the affine layers that cannot absorb anything -> what to call them in a reason.
    """
    flow = _Flow(trace, unable)
    env: Env = {n: flow.kept(n, f"the model's own {name}") for n, name in trace.state.items()}
    env |= {n: flow.kept(n, "a constant") for n in trace.constants}
    env |= {n: flow.kept(n, "the network's input") for n in trace.inputs}
    trace.run(trace.nodes, env, trace.example_batch, keep=trace.outputs, call=flow.apply)
    for node in trace.outputs:
        flow.channels.keep(env[node], "the network's output")
    return flow.channels


class _Flow:
    """Applies the rule of each operator; one without a rule keeps all channels that it reads and writes unchanged."""

    def __init__(self, trace: Trace, unable: Mapping[fx.Node, str]) -> None:
        self.channels = Channels()
        self._trace = trace
        self._unable = unable
        self._rules: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(_MOVES, self._move),
            **dict.fromkeys(_IDENTITIES, self._identity),
            **dict.fromkeys(_AVERAGES, self._average),
            **dict.fromkeys(_ZEROS, self._zeros),
            **dict.fromkeys(_CONVOLUTIONS, self._convolution),
            aten.pad: self._pad,
            aten.mean: self._mean,
            aten.sum: self._sum,
            aten.add: self._add,
            aten.sub: self._subtract,
            aten.mul: self._multiply,
            aten.div: self._divide,
            aten.neg: self._negate,
            aten.linear: self._linear,
            aten.batch_norm: self._batch_norm,
        }

    def apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The channels of the node's output, given its arguments with activations as channels (int64)."""
        packet = packet_of(node)
        if packet is None:
            return self._move(node, *args, **kwargs)  # getitem and the like
        if node.target is aten.view.dtype:
            return self._obstacle(node, *args, **kwargs)
        return self._rules.get(packet, self._obstacle)(node, *args, **kwargs)

    def kept(self, node: fx.Node, what: str) -> Any:
        """One channel for all of a node's value, which must not change."""
        channel = self.channels.issue(1)
        self.channels.keep(channel, what)
        return pytree.tree_map_only(
            Tensor, lambda v: channel[0].expand(self._trace.concrete(v.shape)), node.meta["val"]
        )

    def _obstacle(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.channels.keep(value, described(node))
        return self.kept(node, described(node))

    # -- operators without weights ---------------------------------------------------------------------------

    def _move(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        return evaluate(node, args, kwargs)

    def _identity(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        source: Any = node.args[0]
        if node.meta["val"].dtype != source.meta["val"].dtype:
            return self._obstacle(node, x)
        return x

    def _zeros(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(ZERO).expand(self._trace.shape(node))

    def _pad(self, node: fx.Node, x: Tensor, pad: list[int], mode: str = "constant", value: float | None = None) -> Any:
        if mode != "constant":
            return aten.pad(x.double(), pad, mode).long()  # reflections and the like know no integers
        return self._obstacle(node, x) if value else aten.pad(x, pad, value=ZERO)

    def _average(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rank = _AVERAGES[packet_of(node)]
        first = self.channels.merged(x, range(x.dim() - rank, x.dim()))
        if packet_of(node) in _POOLS and _pool_counts_more(node):
            self.channels.keep(first, f"the divisor of {described(node)}", shift_only=True)
        return first.expand(self._trace.shape(node))

    def _mean(self, node: fx.Node, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        axes = range(x.dim()) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
        return self.channels.merged(x, [axis % x.dim() for axis in axes]).reshape(self._trace.shape(node))

    def _sum(self, node: fx.Node, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        total = self._mean(node, x, dim)
        self.channels.keep(total, described(node), shift_only=True)
        return total

    def _add(self, node: fx.Node, x: Tensor, y: Any, alpha: float = 1) -> Any:
        if isinstance(y, Tensor):
            return self._weighted_sum(node, x, y, 1, alpha)
        return x if y == 0 else self._obstacle(node, x)

    def _subtract(self, node: fx.Node, x: Tensor, y: Any, alpha: float = 1) -> Any:
        return self._add(node, x, y, alpha=-alpha)

    def _multiply(self, node: fx.Node, x: Tensor, y: Any) -> Any:
        if isinstance(y, Tensor) or isinstance(node.args[1], fx.Node):  # a size may depend on the batch
            return self._obstacle(node, x, y)
        return self._weighted_sum(node, x, torch.tensor(ZERO), y, 0)

    def _divide(self, node: fx.Node, x: Tensor, y: Any, **rounding: Any) -> Any:
        if isinstance(y, Tensor) or rounding or y == 0:
            return self._obstacle(node, x, y)
        return self._multiply(node, x, 1 / y)

    def _negate(self, node: fx.Node, x: Tensor) -> Any:
        return self._weighted_sum(node, x, torch.tensor(ZERO), -1, 0)

    def _weighted_sum(self, node: fx.Node, x: Tensor, y: Tensor, p: float, q: float) -> Tensor:
        shape = self._trace.shape(node)
        return self.channels.weighted_sum(x.expand(shape), y.expand(shape), p, q)

    # -- affine layers ---------------------------------------------------------------------------------------

    def _convolution(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight: Any = node.args[1]
        return self._affine(node, x, 1 - weight.meta["val"].dim(), _edge(node))

    def _linear(self, node: fx.Node, x: Tensor, *args: Any) -> Any:
        return self._affine(node, x, -1, None)

    def _affine(self, node: fx.Node, x: Tensor, axis: int, edge: str | None) -> Any:
        """A layer that reads and writes channels along ``axis``, with an ``edge`` beyond which it sees zeros."""
        reads = self.channels.along(x, axis)
        if node in self._unable:
            self.channels.keep(reads, self._unable[node])
            return self.kept(node, self._unable[node])
        name = module_of(self._trace.parameter(node, 1, "weight") or "")
        if edge:
            self.channels.keep(reads, f"{edge} of {name}", shift_only=True)
        shape = self._trace.shape(node)
        layer = AffineLayer(name, node, reads, self.channels.issue(shape[axis]))
        self.channels.layers.append(layer)
        return along(layer.writes, axis, len(shape)).expand(shape)

    def _batch_norm(self, node: fx.Node, x: Tensor, *args: Any) -> Tensor:
        reads, shape = self.channels.along(x, 1), self._trace.shape(node)
        name = module_of(self._trace.parameter(node, 3, "running_mean") or "")
        layer = AffineLayer(name, node, reads, self.channels.issue(shape[1]))
        self.channels.norms[layer.name].append(layer)
        if node in self._unable:
            self.channels.keep(torch.cat([reads, layer.writes]), self._unable[node], norm=layer.name)
        else:
            self.channels.layers.append(layer)
        return along(layer.writes, 1, len(shape)).expand(shape)


def absorbs(node: fx.Node) -> bool:
    """Whether a node is a convolution, transposed or not, a linear layer or a batch norm in eval mode."""
    return packet_of(node) in (*_CONVOLUTIONS, aten.linear, aten.batch_norm)


def _edge(node: fx.Node) -> str | None:
    """What keeps a shift of a convolution's input from being a shift of its output, or None."""
    if packet_of(node) in TRANSPOSED:
        return "the border"  # where fewer positions of the input add up
    weight: Any = node.args[1]
    padding = argument(node, 4, "padding", 0)
    if padding == "same":
        padding = [size - 1 for size in weight.meta["val"].shape[2:]]
    padded = padding != "valid" and any(pytree.tree_leaves(padding))
    return "the zero padding" if padded else None


def _pool_counts_more(node: fx.Node) -> bool:
    """Whether an average pool divides by something other than the number of its elements."""
    padding, counts_padding = argument(node, 3, "padding", 0), argument(node, 5, "count_include_pad", True)
    divisor = argument(node, 6, "divisor_override", None)
    return divisor is not None or (counts_padding and any(pytree.tree_leaves(padding)))
