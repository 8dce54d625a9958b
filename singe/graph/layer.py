"""A weight in use: one convolution or linear layer of a group, with the batch norm after it, as one affine layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from . import batchnorm
from .groups import Group, module_of, rows_by_neuron
from .nodes import argument, packet_of
from .operators import CONVOLUTIONS, TRANSPOSED, aten
from .trace import Env, Trace

_AFFINE = (*CONVOLUTIONS, aten.linear)


@dataclass(frozen=True)
class Geometry:
    """How a convolution slides: a list per spatial axis. A linear layer slides a 1-wide kernel over its positions."""

    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]


@dataclass(frozen=True, eq=False)
class Layer:
    """A writer of a group at one place where it is used.

    Its rows write one output channel each: in a convolution or linear layer ``weight[row]``, in a transposed
    convolution the corresponding part of its weight, see :meth:`kernel`.

    Attributes:
        weight: qualified name of its weight, [N, F...].
        call: the node of the convolution or linear operator.
        x: the node of its input.
        output: the node of its output z, after the batch norm where one belongs to it.
        axis: the channel axis of x and z.
        geometry: how it slides.
        rows: int64 [neurons of the group, rows per neuron].
    """

    weight: str
    call: fx.Node
    x: fx.Node
    output: fx.Node
    axis: int
    geometry: Geometry
    rows: Tensor

    @property
    def weight_node(self) -> fx.Node:
        """The node of the weight."""
        node: Any = self.call.args[1]
        return node

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, not a convolution."""
        return self.call.target is aten.linear.default

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return is_transposed(self.call)

    def kernel(self, live: Env) -> Tensor:
        """The weight as [N, F...], a row for each output channel."""
        weight = live[self.weight_node]
        return turned(weight, _transposed_groups(self.call, len(weight))) if self.transposed else weight

    def rows_left(self, weight: Tensor, removed: Mapping[tuple[str, int], Tensor]) -> Tensor:
        """Which output channels are left once entries of the weight are removed: bool [N].

        Args:
            weight: before.
            removed: (name, axis) -> int64, indices of that axis, of this weight and of others.
        """
        nothing = torch.empty(0, dtype=torch.int64)
        first, second = (removed.get((self.weight, axis), nothing) for axis in (0, 1))
        if not self.transposed:
            left = torch.ones(len(weight), dtype=torch.bool)
            left[first] = False
            return left
        parts = _transposed_groups(self.call, len(weight))
        left = torch.ones(parts, weight.shape[1], dtype=torch.bool)
        left[:, second] = False
        if parts == len(weight):  # each part is one input channel, which is removed with what it becomes
            left[first] = False
        return left.flatten()

    def channels_first(self, value: Tensor) -> Tensor:
        """X or z as [B, channels, positions...]; a linear layer's leading axes become one axis of positions."""
        if self.axis == 1:
            return value
        return value.movedim(-1, 1).flatten(2) if value.dim() > 2 else value.unsqueeze(2)

    def padded(self, x: Tensor) -> Tensor:
        """X [B, C, ...] with the padding that ``geometry.padding`` cannot express (the uneven half of 'same')."""
        extra = self._uneven()
        return F.pad(x, extra) if any(extra) else x

    def _uneven(self) -> list[int]:
        if argument(self.call, 4, "padding", None) != "same":
            return []
        g = self.geometry
        odd = [d * (k - 1) % 2 for d, k in zip(g.dilation, g.kernel_size, strict=True)]
        return [side for o in reversed(odd) for side in (0, o)]

    def patches(self, x: Tensor, size: Sequence[int], places: Tensor) -> Tensor:
        """[n, C, taps]: the inputs that each tap of the kernel is multiplied by at some places of the output.

        Args:
            x: [B, C, ...], channels first.
            size: of the output's spatial axes.
            places: int64 [n], indices into [B, *size].
        """
        image, *position = torch.unravel_index(places, (len(x), *size))
        seen, there = places.new_zeros(len(places), 1), places.new_ones(len(places), 1, dtype=torch.bool)
        for axis, (at, length) in enumerate(zip(position, x.shape[2:], strict=True)):
            along, exists = self._taps(axis, at, length)
            seen = (seen[:, :, None] * length + along.clamp(0, length - 1)[:, None]).flatten(1)
            there = (there[:, :, None] & exists[:, None]).flatten(1)
        flat = x.flatten(2).transpose(1, 2)  # [B, positions, C]
        return flat[image[:, None], seen].masked_fill_(~there[..., None], 0).transpose(1, 2)

    def _taps(self, axis: int, at: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """[n, taps] each: which input every tap meets at places [n] along a spatial axis, and whether it exists."""
        g = self.geometry
        stride, taps = g.stride[axis], torch.arange(g.kernel_size[axis], device=at.device) * g.dilation[axis]
        if self.transposed:  # between the inputs are stride - 1 zeros
            spread = (at + g.padding[axis])[:, None] - taps
            along, meets = spread.div(stride, rounding_mode="floor"), spread % stride == 0
        else:
            along = (at * stride - g.padding[axis])[:, None] + taps
            meets = torch.ones_like(along, dtype=torch.bool)
        return along, meets & (along >= 0) & (along < length)

    def groups(self, x: Tensor, live: Env) -> int:
        """The number of groups of a convolution of x [B, C, ...]; fewer where a depthwise one has lost channels."""
        return x.shape[1] // self.kernel(live).shape[1]

    def folded_rows(self, live: Env, rows: Tensor) -> Tensor:
        """float64 [R, F]: some of the weight's rows, with the batch norm that follows folded in."""
        weight = self.kernel(live)
        rows = rows.to(weight.device)
        folded = weight[rows].double().flatten(1)
        if self.output is not self.call:
            folded = folded * batchnorm.affine(self.output, live).scale.double()[rows, None]
        return folded

    def row_norms(self, live: Env, p: float, neurons: Tensor) -> Tensor:
        """float64 [N]: the p-norm of the weight rows of ``neurons``, batch norm folded in; zero for other rows."""
        rows = self.rows[neurons].flatten()
        folded = self.folded_rows(live, rows)
        norms = torch.zeros(len(self.kernel(live)), dtype=torch.float64, device=folded.device)
        norms[rows.to(folded.device)] = torch.linalg.vector_norm(folded, p, dim=1)
        return norms

    def weight_gradient(self, x: Tensor, delta: Tensor, live: Env) -> Tensor:
        """dL/dW [N, F] for x, padded, and the gradient delta of the (folded) output, both channels first."""
        return self._gradient(x, delta, self.kernel(live), self.groups(x, live))

    def row_gradients(self, x: Tensor, delta: Tensor, row: Tensor, live: Env) -> Tensor:
        """dL/dW [K, F] of one row (int64 [K]) for each of K jobs.

        Args:
            x: [B, C, ...] for all jobs or [K*B, C, ...]; padded, channels first.
            delta: [K, B, *positions], the gradient of those rows' outputs.
            row: which.
            live: the model's values, by node.
        """
        inputs = [x] * len(row) if len(x) == delta.shape[1] else x.chunk(len(row))
        jobs = zip(inputs, delta, row.tolist(), strict=True)
        return torch.stack([self.row_gradient(own, part, index, live) for own, part, index in jobs])

    def row_gradient(self, x: Tensor, delta: Tensor, row: int, live: Env) -> Tensor:
        """dL/dW [F] of one row for x, padded, channels first, and the gradient delta [B, *positions] of its output."""
        weight = self.kernel(live)
        seen = weight.shape[1]
        first = row // (len(weight) // self.groups(x, live)) * seen
        return self._gradient(x.narrow(1, first, seen), delta.unsqueeze(1), weight[row : row + 1], 1)[0]

    def _gradient(self, x: Tensor, delta: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.is_linear:
            return torch.einsum("bnt,bct->nc", delta, x)
        g = self.geometry
        if self.transposed:
            # x and the gradient change places
            parts = zip(x.chunk(groups, 1), delta.chunk(groups, 1), strict=True)
            found = [_convolution_gradient(d, own, own.shape[1], g).transpose(0, 1) for own, d in parts]
            return torch.cat(found).flatten(1)
        return _convolution_gradient(x, delta, len(weight), g, groups).flatten(1)


def _convolution_gradient(x: Tensor, delta: Tensor, rows: int, g: Geometry, groups: int = 1) -> Tensor:
    """dL/dW [rows, C / groups, *kernel] of a convolution of x [B, C, ...] with the gradient delta [B, rows, ...]."""
    weight = x.new_empty(rows, x.shape[1] // groups, *g.kernel_size)
    gradient: Tensor = aten.convolution_backward(
        delta, x, weight, None, g.stride, g.padding, g.dilation, False, [0], groups, [False, True, False],
    )[1]  # fmt: skip
    return gradient


def turned(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight [groups * C, N / groups, ...] as an ordinary one's [N, C, ...], or back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def is_layer(node: fx.Node) -> bool:
    """Whether a node is a linear layer or a convolution, transposed or not."""
    return is_affine(node) or is_transposed(node)


def is_affine(node: fx.Node) -> bool:
    """Whether a node is a convolution, other than transposed, or linear layer."""
    return packet_of(node) in _AFFINE


def is_transposed(node: fx.Node) -> bool:
    """Whether a node is a transposed convolution."""
    return packet_of(node) in TRANSPOSED


def find_layers(trace: Trace, group: Group) -> list[Layer]:
    """The group's writers as used in ``trace``, in execution order, once for every use.

    Raises:
        ValueError: none is used.
    """
    calls = {weight: trace.calls(weight) for weight in group.writers}
    order = {call: i for i, call in enumerate(trace.nodes)}
    found = [
        layer_at(trace, call, weight, _rows(call, weight, group)) for weight in group.writers for call in calls[weight]
    ]
    if not found:
        raise ValueError(f"expected {', '.join(map(module_of, group.writers))} to be used in eval mode")
    return sorted(found, key=lambda layer: order[layer.call])


def layer_at(trace: Trace, call: fx.Node, weight: str, rows: Tensor) -> Layer:
    """A weight at one of the places where it is used, with the rows (int64 [neurons, rows per neuron]) that matter."""
    behind = batchnorm.of_weight(trace, weight).get(call)
    arguments: tuple[Any, ...] = call.args
    if call.target is aten.linear.default:
        axis, geometry = -1, Geometry([1], [1], [0], [1])
    else:
        axis, geometry = 1, geometry_of(call)
    return Layer(weight, call, arguments[0], behind or call, axis, geometry, rows)


def _rows(call: fx.Node, weight: str, group: Group) -> Tensor:
    """int64 [neurons, rows]: the output channels that a weight writes for each neuron."""
    written = group.written(weight)
    if not is_transposed(call):
        return group.rows(weight)
    inputs, width = call.args[1].meta["val"].shape[:2]  # type: ignore[union-attr]
    if written.dim == 0:  # one input channel for each group
        return rows_by_neuron(written.neuron.repeat_interleave(width), group.size)
    return rows_by_neuron(written.neuron.repeat(_transposed_groups(call, inputs)), group.size)


def _transposed_groups(call: fx.Node, inputs: int) -> int:
    """The number of groups of a transposed convolution of ``inputs`` channels; a depthwise one may have lost some."""
    groups: int = argument(call, 6, "groups", 1)
    return inputs if groups == call.args[1].meta["val"].shape[0] else groups  # type: ignore[union-attr]


def geometry_of(call: fx.Node) -> Geometry:
    """How a convolution slides."""
    weight: Any = call.args[1]
    kernel_size = list(weight.meta["val"].shape[2:])
    rank = len(kernel_size)
    stride = _per_axis(argument(call, 3, "stride", 1), rank)
    dilation = _per_axis(argument(call, 7 if is_transposed(call) else 5, "dilation", 1), rank)
    padding = argument(call, 4, "padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)]
    return Geometry(kernel_size, stride, _per_axis(padding, rank), dilation)


def _per_axis(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
