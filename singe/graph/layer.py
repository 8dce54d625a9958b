"""A weight at work: one convolution or linear layer of a group, with the batch norm behind it, as one affine layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from . import batchnorm
from .groups import Group, module_of
from .trace import CONVOLUTIONS, Env, Trace, aten

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
    """A writer of a group.

    Attributes:
        weight: qualified name of its weight, [N, F...].
        call: the node of the convolution or linear operator.
        x: the node of its input.
        output: the node of its output z, behind the batch norm where one belongs to it.
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

    def channels_first(self, value: Tensor) -> Tensor:
        """X or z as [B, channels, positions...]; a linear layer's leading axes become one axis of positions."""
        if self.axis == 1:
            return value
        return value.movedim(-1, 1).flatten(2) if value.dim() > 2 else value.unsqueeze(2)

    def restored(self, value: Tensor, like: Tensor) -> Tensor:
        """Undoes ``channels_first`` for a value whose batch may differ from that of ``like``."""
        if self.axis == 1:
            return value
        return value.movedim(1, -1).reshape(-1, *like.shape[1:])

    def padded(self, x: Tensor) -> Tensor:
        """X [B, C, ...] with what ``geometry.padding`` cannot say (the uneven half of padding='same')."""
        extra = self._uneven()
        return F.pad(x, extra) if any(extra) else x

    def _uneven(self) -> list[int]:
        if _argument(self.call, 4, "padding", None) != "same":
            return []
        g = self.geometry
        odd = [d * (k - 1) % 2 for d, k in zip(g.dilation, g.kernel_size, strict=True)]
        return [side for o in reversed(odd) for side in (0, o)]

    def groups(self, x: Tensor, live: Env) -> int:
        """Into how many parts the convolution takes x [B, C, ...]; fewer where a depthwise one has lost channels."""
        return x.shape[1] // live[self.weight_node].shape[1]

    def row_norms(self, live: Env, p: float, neurons: Tensor) -> Tensor:
        """float64 [N]: the p-norm of the weight rows of ``neurons``, batch norm folded in; zero for other rows."""
        weight = live[self.weight_node]
        rows = self.rows[neurons].flatten().to(weight.device)
        norms = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        norms[rows] = torch.linalg.vector_norm(weight[rows].double().flatten(1), p, dim=1)
        if self.output is not self.call:
            norms = norms * batchnorm.affine(self.output, live).scale.double().abs()
        return norms

    def weight_gradient(self, x: Tensor, delta: Tensor, live: Env) -> Tensor:
        """dL/dW [N, F] for x, padded, and the gradient delta of the (folded) output, both channels first."""
        return self._gradient(x, delta, live[self.weight_node], self.groups(x, live))

    def row_gradient(self, x: Tensor, delta: Tensor, row: int, live: Env) -> Tensor:
        """dL/dW [F] of one row for x, padded, channels first, and the gradient delta [B, *positions] of its output."""
        weight = live[self.weight_node]
        seen = weight.shape[1]
        first = row // (len(weight) // self.groups(x, live)) * seen
        return self._gradient(x.narrow(1, first, seen), delta.unsqueeze(1), weight[row : row + 1], 1)[0]

    def _gradient(self, x: Tensor, delta: Tensor, weight: Tensor, groups: int) -> Tensor:
        if self.call.target is aten.linear.default:
            return torch.einsum("bnt,bct->nc", delta, x)
        g = self.geometry
        return aten.convolution_backward(
            delta, x, weight, None, g.stride, g.padding, g.dilation, False, [0], groups,
            [False, True, False],
        )[1].flatten(1)  # fmt: skip


def is_affine(node: fx.Node) -> bool:
    """Whether a node is a convolution or linear layer."""
    return getattr(node.target, "overloadpacket", None) in _AFFINE


def find_layers(trace: Trace, group: Group) -> list[Layer]:
    """The group's writers as they stand in ``trace``, in execution order.

    Raises:
        ValueError: a writer is used more than once.
    """
    return [_layer(trace, weight, group.rows(weight)) for weight in group.writers]


def _layer(trace: Trace, weight: str, rows: Tensor) -> Layer:
    calls = trace.calls(weight)
    if len(calls) != 1:
        raise ValueError(f"expected {module_of(weight)} to be used once in the model, it is used {len(calls)} times")
    call = calls[0]
    behind = batchnorm.following(call)
    arguments: tuple[Any, ...] = call.args
    if call.target is aten.linear.default:
        axis, geometry = -1, Geometry([1], [1], [0], [1])
    else:
        axis, geometry = 1, geometry_of(call)
    return Layer(weight, call, arguments[0], behind or call, axis, geometry, rows)


def geometry_of(call: fx.Node) -> Geometry:
    """How a convolution slides."""
    weight: Any = call.args[1]
    kernel_size = list(weight.meta["val"].shape[2:])
    rank = len(kernel_size)
    stride = _per_axis(_argument(call, 3, "stride", 1), rank)
    dilation = _per_axis(_argument(call, 5, "dilation", 1), rank)
    padding = _argument(call, 4, "padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel_size, strict=True)]
    return Geometry(kernel_size, stride, _per_axis(padding, rank), dilation)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)


def _per_axis(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
