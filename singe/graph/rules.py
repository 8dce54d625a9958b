"""What each ATen operator does to the owners of its inputs (see owners.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .claims import Claims, Weight
from .contraction import Product, contract, matmul
from .operators import (
    ALONG_AXIS,
    CONSTANTS,
    CONVOLUTIONS,
    IDENTITIES,
    MOVES,
    PADS,
    POOLS,
    REDUCTIONS,
    SPLITS,
    SUMS,
    TRANSPOSED,
    VIEWS,
    WRITES,
    aten,
)  # fmt: skip
from .owners import NOBODY, Owners, lie_along, representative, tidied, varies
from .stored import Stored
from .trace import Trace, evaluate, kind_of, place_of

# take their argument for numbers, which owners are not
_BY_VALUE = (aten.view.dtype, aten.repeat_interleave.Tensor)


def _run(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """The operator itself."""
    return evaluate(node, args, kwargs)


class Rules:
    """Applies the rule of each operator; an operator without one freezes all it touches.

    Args:
        owners: of the activations.
        claims: what they own.
        trace: whose operators are run.
    """

    def __init__(self, owners: Owners, claims: Claims, trace: Trace) -> None:
        self._owners, self._claims, self._trace = owners, claims, trace
        self._stored = Stored(trace)
        self._weighted: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), self._convolution),
            aten.linear: self._linear,
            aten.batch_norm: self._batch_norm,
            aten._native_batch_norm_legit_functional: self._batch_norm_in_training,
            aten.instance_norm: self._batch_norm,
        }
        self._weightless: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(MOVES, self._move),
            **dict.fromkeys(VIEWS, self._view),
            **dict.fromkeys(SPLITS, self._split),
            **dict.fromkeys(PADS, self._pad),
            **dict.fromkeys(WRITES, self._write),
            **dict.fromkeys(IDENTITIES, self._identity),
            **dict.fromkeys(POOLS, self._pool),
            **dict.fromkeys(CONSTANTS, self._constant),
            **dict.fromkeys(REDUCTIONS, self._reduce),
            **dict.fromkeys(ALONG_AXIS, self._along_axis),
            **dict.fromkeys((aten.matmul, aten.bmm, aten.mm), partial(self._product, self._matmul)),
            aten.scaled_dot_product_attention: partial(self._product, self._attention),
            aten.einsum: partial(self._product, self._einsum),
            aten.layer_norm: self._layer_norm,
            aten.rms_norm: self._layer_norm,
            aten.group_norm: self._group_norm,
            aten.cat: self._cat,
            aten.stack: self._stack,
            aten.index: self._index,
            aten.channel_shuffle: self._shuffle,
            aten.glu: self._glu,
            aten.prelu: self._prelu,
            aten.div: self._divide,
            aten.copy: self._copy,
            aten.grid_sampler: self._sample,
        }

    def apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The owners of the node's output, given its arguments with activations as owners (int64)."""
        return pytree.tree_map_only(Tensor, tidied, self._apply(node, args, kwargs))

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = _packet(node)
        if packet in self._weighted:
            return self._weighted[packet](node, *args, **kwargs)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule = self._weightless.get(packet) or (self._pointwise if pointwise else None)
        if packet is None:
            rule = _run  # getitem and the like
        if rule is None or node.target in _BY_VALUE:
            return self._unknown(node, *args, **kwargs)
        args, kwargs = pytree.tree_map_only(Weight, self._claims.elements, (args, kwargs))
        return rule(node, *args, **kwargs)

    # -- operators that only move what is there --------------------------------------------------------------

    def _move(self, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
        places = [self._known(*pair) for pair in zip(args, node.args[1:], strict=True)]
        if any(isinstance(place, fx.Node) for place in places):
            return self._unknown(node, x)
        moved = evaluate(node, (x, *places), kwargs)
        self._note_widths(node, x, *pytree.tree_leaves(moved))
        return moved

    def _known(self, argument: Any, source: Any) -> Any:
        """An argument that says which elements are picked, as its value; its node where that is not known."""
        if not isinstance(argument, Tensor):
            return argument
        value = self._stored.value(source)
        return source if value is None else value

    def _view(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An axis that a view splits stays rectangular: each of its parts loses the same, or whole parts go."""
        out: Tensor = evaluate(node, (x, *args), kwargs)
        self._note_widths(node, x, out)
        for axes in _axes_of_parts(x.shape, out.shape):
            part = representative(out, (i for i in range(out.dim()) if i not in axes))
            if sum(varies(part, axis) for axis in axes) < 2:
                continue
            if kind_of(node) == "MultiheadAttention":
                self._owners.freeze(part, "torch.nn.MultiheadAttention takes as many channels as it has heads for")
            heads = [axis for axis in axes if self._counts_heads(node, out.shape[axis])]
            # where as many tensors as heads lie in one, they come first
            self._owners.box(part, heads[-1] if heads else None)
        return out

    def _counts_heads(self, node: fx.Node, size: int) -> bool:
        attributes = self._trace.attributes.get(place_of(node), {})
        return any("head" in name and "dim" not in name and value == size for name, value in attributes.items())

    def _note_widths(self, node: fx.Node, *mirrors: Tensor) -> None:
        """Remembers the attributes that the module's code may have taken for the length of an axis of neurons."""
        place = place_of(node)
        for name, value in self._trace.attributes.get(place, {}).items():
            for owners in mirrors:
                for axis in range(owners.dim()):
                    if owners.shape[axis] == value and varies(owners, axis):
                        along = representative(owners, (i for i in range(owners.dim()) if i != axis)).flatten()
                        self._claims.width(f"{place}.{name}" if place else name, along)

    def _split(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Parts of one size are halves, thirds ...: a channel goes from all of them or the split moves."""
        parts = evaluate(node, (x, *args), kwargs)
        self._note_widths(node, x, *parts)
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

    def _glu(self, node: fx.Node, x: Tensor, dim: int = -1) -> Tensor:
        return self._owners.unite(*x.chunk(2, dim))

    def _index(self, node: fx.Node, x: Tensor, indices: list[Any]) -> Any:
        """Picks elements; which ones has to be known."""
        nodes: Any = node.args[1]
        places = [self._known(*pair) for pair in zip(indices, nodes, strict=True)]
        if any(isinstance(place, fx.Node) for place in places):
            return self._unknown(node, x)
        return aten.index(x, places)

    def _pad(self, node: fx.Node, x: Tensor, pad: list[int], *args: Any) -> Tensor:
        if args and isinstance(args[0], str) and args[0] != "constant":
            return aten.pad(x.double(), pad, args[0]).long()  # reflections and the like know no integers
        inside = aten.constant_pad_nd(torch.ones_like(x, dtype=torch.bool), pad)
        return self._beside_constants(node, aten.constant_pad_nd(x, pad), inside)

    def _cat(self, node: fx.Node, parts: list[Tensor], dim: int = 0) -> Tensor:
        inside = torch.cat(
            [torch.full_like(part, bool((part != NOBODY).any()), dtype=torch.bool) for part in parts], dim
        )
        joined = torch.cat(parts, dim)
        others = [axis for axis in range(joined.dim()) if axis != dim % joined.dim() and varies(joined, axis)]
        if others:
            self._owners.box(joined, others[-1])
        return self._beside_constants(node, joined, inside)

    def _stack(self, node: fx.Node, parts: list[Tensor], dim: int = 0) -> Tensor:
        for part in parts[1:]:
            self._owners.unite(parts[0], part)
        return torch.stack(parts, dim)

    def _write(self, node: fx.Node, x: Tensor, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Overwrites a part of a tensor."""
        written: Tensor = evaluate(node, (x, source, *args), kwargs)
        return self._beside_constants(node, written, written != NOBODY)

    def _copy(self, node: fx.Node, x: Tensor, source: Tensor, *args: Any) -> Tensor:
        return source.expand(x.shape)

    def _beside_constants(self, node: fx.Node, owners: Tensor, inside: Tensor) -> Tensor:
        """Issues frozen owners for constants that lie along an axis of neurons: what joins them could go, they stay.

        Constants beside positions of one neuron, such as the zeros around an image, belong to nobody.
        """
        if inside.all() or not inside.any():
            return owners
        for axis in range(owners.dim()):
            slabs = inside.movedim(axis, 0).flatten(1).any(1)
            if not slabs.all() and _is_channels(owners, axis):
                fixed = self._owners.issue((len(slabs),))
                self._owners.freeze(fixed[~slabs], f"joins constants of a fixed width ({_name(node)})")
                owners = torch.where(_along(slabs, axis, owners.dim()), owners, _along(fixed, axis, owners.dim()))
        return owners

    def _constant(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(NOBODY).expand(self._shape(node))

    def _identity(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, x) if isinstance(node.meta["val"], tuple) else x.expand(self._shape(node))

    # -- operators that combine ------------------------------------------------------------------------------

    def _pointwise(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        result = torch.tensor(NOBODY).expand(self._shape(node))
        sources = pytree.tree_leaves((node.args, node.kwargs))
        values = pytree.tree_leaves((args, kwargs))
        operands = [pair for pair in zip(sources, values, strict=True) if isinstance(pair[1], Tensor)]
        for source, operand in sorted(operands, key=lambda pair: pair[1].numel(), reverse=True):
            result = self._combine(node, result, operand, source)
        return result

    def _combine(self, node: fx.Node, result: Tensor, operand: Tensor, source: Any) -> Tensor:
        """Unites an operand with the owners so far; one that spreads over several neurons is frozen instead."""
        if _packet(node) in (aten.add, aten.sub) and self._stored.is_computed(source):
            self._owners.freeze(operand, f"added to a computed parameter by {_name(node)}")
        spread = operand.expand(result.shape)
        missing = result.dim() - operand.dim()
        broadcast = [i for i in range(result.dim()) if i < missing or operand.shape[i - missing] == 1]
        if getattr(source, "target", None) is aten.expand.default:
            before = source.args[0].meta["val"].shape
            broadcast += [i for i, size in enumerate(before, result.dim() - len(before)) if size == 1]
        if any(varies(result, axis) for axis in broadcast if axis >= 0):
            self._owners.freeze(operand, f"broadcast over other neurons by {_name(node)}")
            return result
        return self._owners.unite(result, spread)

    def _divide(self, node: fx.Node, x: Any, divisor: Any, **kwargs: Any) -> Tensor:
        """A removed divisor would divide by zero."""
        if isinstance(divisor, Tensor) and (divisor != NOBODY).any() and divisor.numel() > 1:
            unknown: Tensor = self._unknown(node, x, divisor, reason=f"{_name(node)} divides by it")
            return unknown
        return self._pointwise(node, x, divisor, **kwargs)

    def _prelu(self, node: fx.Node, x: Tensor, slope: Tensor) -> Tensor:
        if slope.numel() > 1:
            self._per_channel(x, slope)
        return x

    def _per_channel(self, x: Tensor, values: Tensor) -> None:
        """Says that values, [C], belong to the channels at axis 1."""
        self._owners.unite(x, _along(values, 1, x.dim()).expand_as(x))

    def _pool(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rank = POOLS[_packet(node)]
        first = self._owners.unite_along(x, range(x.dim() - rank, x.dim()))
        return self._filled(node, first)

    def _sample(self, node: fx.Node, x: Tensor, places: Tensor, *args: Any) -> Tensor:
        """Looks up positions of every channel; what says where is no channel."""
        self._owners.freeze(places, f"tells {_name(node)} where to look")
        sampled: Tensor = self._filled(node, self._owners.unite_along(x, range(2, x.dim())))
        return sampled

    def _reduce(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        axes = self._axes(node, x.dim(), args, kwargs)
        kept = [axis for axis in range(x.dim()) if axis not in axes]
        if any(varies(x, axis) for axis in axes) and not any(varies(x, axis) for axis in kept):
            if _packet(node) in SUMS:
                self._owners.contract(x)
            else:
                self._owners.freeze(x, f"taken together by {_name(node)}, which would change")
            return self._filled(node, torch.tensor(NOBODY))
        first = self._owners.unite_along(x, axes)
        return pytree.tree_map_only(Tensor, lambda v: first.reshape(self._concrete(v.shape)), node.meta["val"])

    def _axes(self, node: fx.Node, rank: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
        names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
        dims = dict(zip(names[1:], args, strict=False)) | kwargs
        over = dims.get("dim")
        over = range(rank) if over is None or over == [] else [over] if isinstance(over, int) else over
        return [axis % rank for axis in over]

    def _along_axis(self, node: fx.Node, x: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
        """A softmax and the like: neurons that take part in one statistic stay."""
        axis = dim % x.dim()
        if any(varies(x, i) for i in range(x.dim()) if i != axis):
            return self._owners.unite_along(x, [axis]).expand_as(x)
        if varies(x, axis):
            self._owners.freeze(x, f"taken together by {_name(node)}, which would change")
        return x

    # -- products of activations -----------------------------------------------------------------------------

    def _product(self, rule: Callable[..., Tensor], node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        """Applies a rule for activations; a parameter among the factors stays, and so does what it is multiplied by."""
        factors = [i for i in pytree.tree_leaves(node.args[:3]) if isinstance(i, fx.Node)]  # behind them, a mask
        stored = [self._stored.holds(i) for i in factors]
        if any(stored) and not all(stored):
            reason = f"{_name(node)} multiplies with a parameter"
            for i in factors:
                self._freeze_sources(i, reason)
            unknown: Tensor = self._unknown(node, *args, reason=reason)
            return unknown
        return rule(node, *args, **kwargs)

    def _matmul(self, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
        rank = max(a.dim(), b.dim())
        if min(a.dim(), b.dim()) < 2:
            unknown: Tensor = self._unknown(node, a, b)
            return unknown
        a, b = (x[(None,) * (rank - x.dim())] for x in (a, b))
        return self._contract(node, matmul(rank), a, b)

    def _einsum(self, node: fx.Node, equation: str, operands: list[Tensor], **kwargs: Any) -> Tensor:
        product = Product.parsed(equation) if len(operands) == 2 else None
        if product is None:
            unknown: Tensor = self._unknown(node, operands)
            return unknown
        return self._contract(node, product, *operands)

    def _attention(
        self, node: fx.Node, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if query.shape[:-2] != key.shape[:-2]:  # several queries share a key
            unknown: Tensor = self._unknown(node, query, key, value, attn_mask)
            return unknown
        product = matmul(query.dim())
        scores = self._contract(node, product, query, key.transpose(-1, -2))
        if attn_mask is not None:
            scores = self._combine(node, scores, attn_mask, None)
        return self._contract(node, product, scores, value)

    def _contract(self, node: fx.Node, product: Product, a: Tensor, b: Tensor) -> Tensor:
        return contract(self._owners, product, a, b, f"multiplied with what cannot go by {_name(node)}")

    # -- normalisation ---------------------------------------------------------------------------------------

    def _layer_norm(self, node: fx.Node, x: Tensor, shape: list[int], *args: Any, **kwargs: Any) -> Tensor:
        """Statistics over channels would change with them; over positions alone they do not."""
        over = range(x.dim() - len(shape), x.dim())
        if any(varies(x, axis) for axis in over):
            self._owners.freeze(x, f"normalised across channels by {_name(node)}")
        for values in (a for a in args[:2] if isinstance(a, Tensor)):
            x = self._combine(node, x, values, None)
        return x

    def _group_norm(self, node: fx.Node, x: Tensor, groups: int, *args: Any) -> Tensor:
        channels = self._owners.channels(x, 1)
        self._owners.freeze(channels, f"normalised across channels by {_name(node)}")
        for values in (a for a in args[:2] if isinstance(a, Tensor)):
            self._per_channel(x, values)
        return x

    def _batch_norm(self, node: fx.Node, x: Any, *args: Any) -> Any:
        if not isinstance(x, Tensor):
            return self._unknown(node, x, *args)
        channels = self._owners.channels(x, 1)
        sources: Any = node.args[1:]
        for vector, source in zip(args[:4], sources, strict=False):
            if isinstance(vector, Weight):
                self._claims.claim(vector.name, 0, channels, "writes")
            elif isinstance(vector, Tensor):
                reason = f"the weight of {_name(node)} is computed"
                self._owners.freeze(channels, reason)
                self._freeze_sources(source, reason)
        return _along(channels, 1, x.dim()).expand_as(x)

    def _batch_norm_in_training(self, node: fx.Node, x: Any, *args: Any) -> Any:
        """Puts out the batch's statistics and the new running ones beside."""
        statistics = pytree.tree_leaves(node.meta["val"])[1:]
        nobody = [torch.tensor(NOBODY).expand(self._concrete(s.shape)) for s in statistics]
        return [self._batch_norm(node, x, *args), *nobody]

    # -- layers ----------------------------------------------------------------------------------------------

    def _convolution(
        self, node: fx.Node, x: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        transposed = _packet(node) in TRANSPOSED
        # behind stride, padding, and dilation or output_padding
        groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
        return self._affine(node, x, weight, bias, 1, groups, transposed)

    def _linear(self, node: fx.Node, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
        return self._affine(node, x, weight, bias, -1)

    def _affine(
        self, node: fx.Node, x: Tensor, weight: Any, bias: Any, axis: int, groups: int = 1, transposed: bool = False
    ) -> Tensor:
        """Reads owners along ``axis`` as the weight's columns and writes its rows there."""
        if not isinstance(weight, Weight) or not isinstance(bias, Weight | None) or not isinstance(x, Tensor):
            reason = f"the weight of {_name(node)} is computed"
            for source in node.all_input_nodes[1:]:
                self._freeze_sources(source, reason)
            unknown: Tensor = self._unknown(node, x, weight, bias, reason=reason)
            return unknown
        channels = self._owners.channels(x, axis)
        write = self._transposed_rows if transposed else self._rows
        rows = write(weight, channels, groups)
        if bias is not None:
            self._claims.claim(bias.name, 0, rows, "writes")
        shape = self._shape(node)
        return _along(rows, axis, len(shape)).expand(shape)

    def _rows(self, weight: Weight, channels: Tensor, groups: int) -> Tensor:
        if groups > 1 and weight.shape[1] == 1:
            return self._claims.rows_of(weight.name, 0, channels.repeat_interleave(weight.shape[0] // groups))
        # a kernel spans as many columns in every group of a convolution: they lose the same ones
        self._claims.claim(weight.name, 1, self._owners.unite_parts(channels, groups), "reads")
        rows = self._claims.rows(weight.name, 0, weight.shape[0])
        self._owners.unite_parts(rows, groups)
        return rows

    def _transposed_rows(self, weight: Weight, channels: Tensor, groups: int) -> Tensor:
        if groups > 1 and groups == weight.shape[0]:
            self._claims.rows_of(weight.name, 0, channels)
            return channels.repeat_interleave(weight.shape[1])
        self._owners.unite_parts(channels, groups)
        self._claims.claim(weight.name, 0, channels, "reads")
        return self._claims.rows(weight.name, 1, weight.shape[1]).repeat(groups)

    # -- the rest --------------------------------------------------------------------------------------------

    def _unknown(self, node: fx.Node, *args: Any, reason: str | None = None, **kwargs: Any) -> Any:
        """Freezes every neuron an operator without a rule reads, and issues frozen ids for what it writes."""
        reason = reason or f"no rule for {_name(node)}"
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Weight):
                self._claims.freeze(value, reason)
            elif isinstance(value, Tensor):
                self._owners.freeze(value, reason)

        def issue(value: Any) -> Any:
            return fixed(self._owners, self._concrete(value.shape), reason)

        return pytree.tree_map_only(Tensor, issue, node.meta["val"])

    def _freeze_sources(self, node: fx.Node, reason: str) -> None:
        """Freezes the parameters that a stored value is computed from."""
        for source in self._stored.sources(node):
            self._claims.freeze(Weight(self._trace.state[source], tuple(source.meta["val"].shape)), reason)

    def _filled(self, node: fx.Node, owners: Tensor) -> Any:
        """Owners expanded to each of the node's outputs."""
        return pytree.tree_map_only(Tensor, lambda v: owners.expand(self._concrete(v.shape)), node.meta["val"])

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return self._concrete(node.meta["val"].shape)

    def _concrete(self, shape: Iterable[Any]) -> tuple[int, ...]:
        return tuple(self._trace.size(s, self._trace.example_batch) for s in shape)


def fixed(owners: Owners, shape: tuple[int, ...], reason: str) -> Tensor:
    """Frozen owners of a tensor whose channels, should it have any, are at axis 1."""
    ids = owners.issue([size if axis == min(1, len(shape) - 1) else 1 for axis, size in enumerate(shape)])
    owners.freeze(ids, reason)
    return ids.expand(shape)


def _packet(node: fx.Node) -> Any:
    """All overloads of a node's operator as one; None for plain Python functions."""
    return getattr(node.target, "overloadpacket", None)


def _axes_of_parts(before: torch.Size, after: torch.Size) -> list[list[int]]:
    """For each axis (or run of axes) that a view takes apart, the axes of the result that it becomes."""
    parts, i, j = [], 0, 0
    if 0 in before:
        return []
    while i < len(before) and j < len(after):
        taken, given, axes = before[i], after[j], [j]
        i, j = i + 1, j + 1
        while taken != given:
            if taken < given:
                taken, i = taken * before[i], i + 1
            else:
                given, j = given * after[j], j + 1
                axes.append(j - 1)
        parts.append(axes)
    return [axes for axes in parts if len(axes) > 1]


def _is_channels(owners: Tensor, axis: int) -> bool:
    """Whether neurons lie along ``axis``; repeated ones may be positions that were channels, if others have some."""
    others = (i for i in range(owners.dim()) if i != axis)
    return lie_along(owners, axis) or (
        lie_along(owners, axis, repeated=True) and not any(lie_along(owners, other) for other in others)
    )


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = len(values)
    return values.view(shape)


def _name(node: fx.Node) -> str:
    """The operator and where in the model it stands, for reasons a user reads."""
    place = place_of(node)
    return f"{node.target} in {place}" if place else str(node.target)
