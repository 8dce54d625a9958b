"""What each ATen operator does to the owners of its inputs (see owners.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .owners import NOBODY, Owners, Weight
from .trace import CONVOLUTIONS, Trace, evaluate, place_of

aten = torch.ops.aten

# run on the owners as they are
_MOVES = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.movedim, aten.squeeze,
    aten.unsqueeze, aten.flatten, aten.unflatten, aten.slice, aten.select, aten.narrow, aten.index_select,
    aten.stack, aten.expand, aten.repeat, aten.unbind, aten.flip, aten.roll, aten.pixel_shuffle, aten.pixel_unshuffle,
}  # fmt: skip
# leave every element where it is
_IDENTITIES = {
    aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy, aten.dropout, aten.feature_dropout,
    aten.alpha_dropout, aten._to_copy, aten.to, aten.type_as, aten.hardswish, aten.hardsigmoid, aten.zeros_like,
    aten.ones_like, aten.full_like,
}  # fmt: skip
# combine elements of one channel over trailing axes; the value is the number of those axes
_POOLS = {
    aten.max_pool1d: 1, aten.max_pool2d: 2, aten.max_pool3d: 3, aten.avg_pool1d: 1, aten.avg_pool2d: 2,
    aten.avg_pool3d: 3, aten.adaptive_avg_pool1d: 1, aten.adaptive_avg_pool2d: 2, aten.adaptive_avg_pool3d: 3,
    aten._adaptive_avg_pool2d: 2, aten._adaptive_avg_pool3d: 3, aten.max_pool2d_with_indices: 2,
    aten.max_pool3d_with_indices: 3, aten.adaptive_max_pool1d: 1, aten.adaptive_max_pool2d: 2,
    aten.adaptive_max_pool3d: 3, aten.upsample_nearest1d: 1, aten.upsample_nearest2d: 2, aten.upsample_nearest3d: 3,
    aten._upsample_nearest_exact1d: 1, aten._upsample_nearest_exact2d: 2, aten._upsample_nearest_exact3d: 3,
    aten.upsample_linear1d: 1, aten.upsample_bilinear2d: 2, aten.upsample_bicubic2d: 2, aten.upsample_trilinear3d: 3,
}  # fmt: skip
_SPLITS = {aten.split, aten.split_with_sizes, aten.chunk}
_PADS = {aten.pad, aten.constant_pad_nd}
_CONSTANTS = {
    aten.zeros, aten.ones, aten.full, aten.empty, aten.arange, aten.scalar_tensor, aten.new_zeros, aten.new_ones,
    aten.new_full,
}  # fmt: skip
_REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.amin}


def _run(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """The operator itself."""
    return evaluate(node, args, kwargs)


class Rules:
    """Applies the rule of each operator; an operator without one freezes all it touches."""

    def __init__(self, owners: Owners, trace: Trace) -> None:
        self._owners = owners
        self._trace = trace
        self._weighted: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(CONVOLUTIONS, self._convolution),
            aten.linear: self._linear,
            aten.batch_norm: self._batch_norm,
            aten.prelu: self._prelu,
        }
        self._weightless: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(_MOVES, _run),
            **dict.fromkeys(_SPLITS, self._split),
            **dict.fromkeys(_PADS, self._pad),
            **dict.fromkeys(_IDENTITIES, self._identity),
            **dict.fromkeys(_POOLS, self._pool),
            **dict.fromkeys(_CONSTANTS, self._constant),
            aten.cat: self._cat,
            aten.channel_shuffle: self._shuffle,
            **dict.fromkeys(_REDUCTIONS, self._reduce),
        }

    def apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The owners of the node's output, given its arguments with activations as owners (int64)."""
        return self._rule(node, args, kwargs)(node, *args, **kwargs)

    def _rule(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        packet = _packet(node)
        if packet in self._weighted:
            return self._weighted[packet]
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if packet is not None and _weights(args, kwargs):
            reason = f"a parameter or buffer is an operand of {_name(node)}" if pointwise else None
            return partial(self._unknown, reason=reason)
        if node.target is aten.view.dtype:
            return self._unknown  # owners have no bits to look at
        if packet in self._weightless:
            return self._weightless[packet]
        if packet is None:
            return _run  # getitem and the like
        if packet is aten.div and len(node.all_input_nodes) > 1:
            return self._unknown  # a removed divisor divides by zero
        return self._pointwise if pointwise else self._unknown

    # -- operators that only move or combine what is there ---------------------------------------------------

    def _split(self, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
        """Parts of one size are halves, thirds ...: a channel goes from all of them or the split moves."""
        parts = evaluate(node, args, kwargs)
        for part in parts[1:]:
            if all(p.shape == part.shape for p in parts):
                self._owners.unite(parts[0], part)
        return parts

    def _shuffle(self, node: fx.Node, x: Tensor, groups: int) -> Tensor:
        """Parts are interleaved: a channel goes from all of them or the others change places."""
        first, *others = x.chunk(groups, 1)
        for other in others:
            self._owners.unite(first, other)
        shuffled: Tensor = aten.channel_shuffle(x, groups)
        return shuffled

    def _pad(self, node: fx.Node, x: Tensor, pad: list[int], *args: Any) -> Tensor:
        if args and isinstance(args[0], str) and args[0] != "constant":
            return aten.pad(x.double(), pad, args[0]).long()  # reflections and the like know no integers
        inside = aten.constant_pad_nd(torch.ones_like(x, dtype=torch.bool), pad)
        return self._beside_constants(node, aten.constant_pad_nd(x, pad), inside)

    def _cat(self, node: fx.Node, parts: list[Tensor], dim: int = 0) -> Tensor:
        inside = torch.cat(
            [torch.full_like(part, bool((part != NOBODY).any()), dtype=torch.bool) for part in parts], dim
        )
        return self._beside_constants(node, torch.cat(parts, dim), inside)

    def _beside_constants(self, node: fx.Node, owners: Tensor, inside: Tensor) -> Tensor:
        """Issues frozen owners for constants that lie along an axis of neurons: what joins them could go, they stay.

        Constants beside positions of one neuron, such as the zeros around an image, belong to nobody.
        """
        for axis in range(owners.dim()):
            slabs = inside.movedim(axis, 0).flatten(1).any(1)
            if not slabs.all() and self._owners.lie_along(owners, axis):
                fixed = self._owners.issue((len(slabs),))
                self._owners.freeze(fixed[~slabs], f"joins constants of a fixed width ({_name(node)})")
                owners = torch.where(_along(slabs, axis, owners.dim()), owners, _along(fixed, axis, owners.dim()))
        return owners

    def _constant(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        return torch.full(self._shape(node), NOBODY)

    def _identity(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x

    def _pointwise(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        shape = self._shape(node)
        operands = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        result = torch.full(shape, NOBODY)
        for operand in sorted(operands, key=lambda a: a.numel(), reverse=True):
            result = self._combine(node, result, operand)
        return result

    def _combine(self, node: fx.Node, result: Tensor, operand: Tensor) -> Tensor:
        """Unites an operand with the owners so far; one that spreads over several neurons is frozen instead."""
        spread = operand.expand(result.shape)
        axes = [i for i in range(spread.dim()) if spread.stride(i) == 0 and spread.size(i) > 1]
        first = result
        for axis in axes:
            first = first.narrow(axis, 0, 1)
        if torch.equal(first.expand_as(result), result):
            return self._owners.unite(result, spread)
        self._owners.freeze(operand, f"broadcast over other neurons by {_name(node)}")
        return result

    def _pool(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rank = _POOLS[_packet(node)]
        first = self._owners.unite_along(x, tuple(range(x.dim() - rank, x.dim())))
        shapes = pytree.tree_map_only(Tensor, lambda v: self._concrete(v.shape), node.meta["val"])
        if isinstance(node.meta["val"], Tensor):
            return first.expand(shapes).contiguous()
        return tuple(first.expand(s).contiguous() for s in shapes)

    def _reduce(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dims = args[0] if args else kwargs.get("dim")
        dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        axes = tuple(d % x.dim() for d in dims)
        return self._owners.unite_along(x, axes).reshape(self._shape(node))

    # -- operators with weights ------------------------------------------------------------------------------

    def _convolution(
        self, node: fx.Node, x: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        names = ("stride", "padding", "dilation", "groups")
        groups = dict(zip(names, args, strict=False)).get("groups", kwargs.get("groups", 1))
        return self._affine(node, x, weight, bias, 1, groups)

    def _linear(self, node: fx.Node, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
        return self._affine(node, x, weight, bias, -1)

    def _affine(self, node: fx.Node, x: Tensor, weight: Any, bias: Any, axis: int, groups: int = 1) -> Tensor:
        """Reads owners along ``axis`` as the weight's columns and writes its rows there."""
        if not isinstance(weight, Weight) or not isinstance(bias, Weight | None) or not isinstance(x, Tensor):
            return self._unknown(node, x, weight, bias, reason=f"the weight of {_name(node)} is computed")
        channels = self._owners.channels(x, axis)
        if groups > 1 and weight.shape[1] == 1:
            rows = self._owners.rows_of(weight.name, channels.repeat_interleave(weight.shape[0] // groups))
        else:
            # a kernel spans as many columns in every group of a convolution: they lose the same ones
            self._owners.claim(weight.name, 1, self._owners.unite_parts(channels, groups))
            rows = self._owners.rows(weight.name, weight.shape[0])
            self._owners.unite_parts(rows, groups)
        if bias is not None:
            self._owners.claim(bias.name, 0, rows)
        shape = self._shape(node)
        return _along(rows, axis, len(shape)).expand(shape).contiguous()

    def _batch_norm(self, node: fx.Node, x: Any, *args: Any) -> Any:
        if not isinstance(x, Tensor):
            return self._unknown(node, x, *args)
        channels = self._owners.channels(x, 1)
        for vector in args[:4]:
            if isinstance(vector, Weight):
                self._owners.claim(vector.name, 0, channels)
        return _along(channels, 1, x.dim()).expand_as(x).contiguous()

    def _prelu(self, node: fx.Node, x: Any, slope: Any) -> Any:
        one_for_all = isinstance(slope, Weight) and slope.shape == (1,) and isinstance(x, Tensor)
        return x if one_for_all else self._unknown(node, x, slope)

    def _unknown(self, node: fx.Node, *args: Any, reason: str | None = None, **kwargs: Any) -> Any:
        """Freezes every neuron an operator without a rule reads, and issues frozen ids for what it writes."""
        reason = reason or f"no rule for {_name(node)}"
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Weight):
                self._owners.freeze_tensor(value, reason)
            elif isinstance(value, Tensor):
                self._owners.freeze(value, reason)

        def issue(value: Any) -> Any:
            ids = self._owners.issue(self._concrete(value.shape))
            self._owners.freeze(ids, reason)
            return ids

        return pytree.tree_map_only(Tensor, issue, node.meta["val"])

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return self._concrete(node.meta["val"].shape)

    def _concrete(self, shape: torch.Size) -> tuple[int, ...]:
        return tuple(self._trace.size(s, self._trace.example_batch) for s in shape)


def _weights(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a parameter or buffer is among the arguments."""
    return any(isinstance(a, Weight) for a in pytree.tree_leaves((args, kwargs)))


def _packet(node: fx.Node) -> Any:
    """All overloads of a node's operator as one; None for plain Python functions."""
    return getattr(node.target, "overloadpacket", None)


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = len(values)
    return values.view(shape)


def _name(node: fx.Node) -> str:
    """The operator and where in the model it stands, for reasons a user reads."""
    place = place_of(node)
    return f"{node.target} in {place}" if place else str(node.target)
