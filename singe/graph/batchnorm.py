"""Batch norm as an affine map per channel, and which one belongs to which layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .groups import module_of
from .operators import aten
from .trace import Env, Trace


@dataclass(frozen=True)
class Affine:
    """y = scale * x + shift per channel, both [N] in the batch norm's dtype."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Norm:
    """A batch norm by the names of its tensors, all [N], and its epsilon."""

    scale: str
    shift: str
    mean: str
    var: str
    eps: float


def is_batch_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm in eval mode."""
    return node.target is aten.batch_norm.default


def is_plain(node: fx.Node) -> bool:
    """Whether a node is a batch norm by the model's own parameters and buffers, none of them computed."""
    own = (a is None or a.op == "placeholder" for a in node.args[1:5])  # type: ignore[union-attr]
    return is_batch_norm(node) and all(own)


def following(call: fx.Node) -> fx.Node | None:
    """The batch norm that alone reads a layer's output, or None: together they are one affine layer."""
    users = list(call.users)
    if call.target is aten.linear.default and len(call.meta["val"].shape) != 2:
        return None  # batch norm's channels are axis 1, the layer's are the last
    if len(users) == 1 and is_plain(users[0]) and users[0].args[0] is call:
        return users[0]
    return None


def of_weight(trace: Trace, weight: str) -> dict[fx.Node, fx.Node]:
    """The batch norms that a weight can absorb, by its calls: the same one everywhere, since it is one weight."""
    found = {call: following(call) for call in trace.calls(weight)}
    if len({owned_tensor(trace, norm) if norm is not None else None for norm in found.values()}) != 1:
        return {}
    return {call: norm for call, norm in found.items() if norm is not None}


def affine(node: fx.Node, live: Env) -> Affine:
    """Scale = gamma / sqrt(var + eps) and shift = beta - scale * mean of a batch norm node, from live values."""
    arguments: tuple[Any, ...] = node.args
    weight, bias, mean, var = (None if a is None else live[a] for a in arguments[1:5])
    return _affine(weight, bias, mean, var, arguments[7])


def affine_of(norm: Any) -> Affine:
    """The same for a module, in float64; a shift that is only rounding error is zero."""
    weight, bias = (None if t is None else t.detach().double() for t in (norm.weight, norm.bias))
    mean, var = norm.running_mean.double(), norm.running_var.double()
    known, rounding = _affine(weight, bias, mean, var, norm.eps), 4 * torch.finfo(norm.running_mean.dtype).eps
    return Affine(known.scale, known.shift.where(known.shift.abs() > rounding * (known.scale * mean).abs(), 0))


def norm_at(trace: Trace, nodes: Sequence[fx.Node]) -> Norm | None:
    """The tensors of the batch norm at some nodes; None if they are none, lack any, or share any with other nodes."""
    if not all(is_plain(node) for node in nodes):
        return None
    scale, shift, mean, var = names = [trace.parameter(nodes[0], i, "") for i in range(1, 5)]
    if scale is None or shift is None or mean is None or var is None:
        return None
    if any(trace.calls(name) != [*nodes] for name in names if name is not None):
        return None
    eps: Any = nodes[0].args[7]
    return Norm(scale, shift, mean, var, eps)


@torch.no_grad()
def restate(norm: Norm, tensors: Mapping[str, Tensor], now_mean: Tensor, now_var: Tensor) -> None:
    """Gives a batch norm the statistics of its inputs, and the scale and shift with which its outputs stay the same.

    In train mode, which uses the statistics of its inputs, it then does what it does in eval mode, and re-estimating
    the statistics does not change them.

    Args:
        norm: the batch norm.
        tensors: by name; changed in place.
        now_mean: float64 [N], the mean of its inputs.
        now_var: float64 [N], their variance.
    """
    scale, shift, mean, var = (tensors[name] for name in (norm.scale, norm.shift, norm.mean, norm.var))
    stretch = scale.double() / (var.double() + norm.eps).sqrt()
    shift += stretch * (now_mean - mean)
    scale.copy_(stretch * (now_var + norm.eps).sqrt())
    mean.copy_(now_mean)
    var.copy_(now_var)


def _affine(weight: Tensor | None, bias: Tensor | None, mean: Any, var: Any, eps: float) -> Affine:
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return Affine(scale, shift)


def folds(call: fx.Node, live: Env) -> bool:
    """Whether ``folded`` applies: a batch norm follows, all weights are the model's own and of one dtype."""
    norm = following(call)
    if norm is None or call.kwargs:
        return False
    tensors = [a for a in (*call.args[1:3], *norm.args[1:5]) if a is not None]
    return all(a in live for a in tensors) and len({live[a].dtype for a in tensors}) == 1  # type: ignore[index]


def folded(call: fx.Node, live: Env) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution or linear layer that also does the batch norm ``following`` it."""
    arguments: tuple[Any, ...] = call.args
    known = affine(next(iter(call.users)), live)
    weight = live[arguments[1]]
    bias = live[arguments[2]] if len(arguments) > 2 and arguments[2] is not None else None
    shift = known.shift if bias is None else torch.addcmul(known.shift, known.scale, bias)
    return weight * known.scale.view(-1, *[1] * (weight.dim() - 1)), shift


def module(trace: Trace, node: fx.Node) -> str:
    """Name of the module whose tensors a batch norm node uses; empty where it has none of the model's."""
    return module_of(owned_tensor(trace, node) or "")


def owned_tensor(trace: Trace, node: fx.Node) -> str | None:
    """A parameter or buffer of a batch norm by which a group recognises its channels."""
    for argument in node.args[1:5]:
        if isinstance(argument, fx.Node) and argument in trace.state:
            return trace.state[argument]
    return None
