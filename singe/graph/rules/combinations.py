"""Operators without weights that combine elements: pointwise ones, pools, reductions and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..contraction import Product, contract, matmul
from ..mirrors import NOBODY, along, varies
from ..nodes import described, packet_of
from ..operators import POOLS, SUMS, aten
from .base import Base, fixed


class Combinations(Base):
    """Elements of one sum or product are one neuron, or terms that can each be removed."""

    def _pointwise(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        result = torch.tensor(NOBODY).expand(self._trace.shape(node))
        sources = pytree.tree_leaves((node.args, node.kwargs))
        values = pytree.tree_leaves((args, kwargs))
        operands = [pair for pair in zip(sources, values, strict=True) if isinstance(pair[1], Tensor)]
        for source, operand in sorted(operands, key=lambda pair: pair[1].numel(), reverse=True):
            result = self._combine(node, result, operand, source)
        return result

    def _where(self, node: fx.Node, *args: Any) -> Any:
        """A choice between two values, of which one may be a number; or the places where a condition holds."""
        return self._unknown(node, *args) if len(args) == 1 else self._pointwise(node, *args)

    def _combine(self, node: fx.Node, result: Tensor, operand: Tensor, source: Any) -> Tensor:
        """Unites an operand with the owners so far; one that spreads over several neurons is frozen instead."""
        added = packet_of(node) in (aten.add, aten.sub)
        if added and self._stored.is_computed(source) and not self._stored.vanishes(source):
            self._owners.freeze(operand, f"added to a computed parameter by {described(node)}")
        spread = operand.expand(result.shape)
        missing = result.dim() - operand.dim()
        broadcast = [i for i in range(result.dim()) if i < missing or operand.shape[i - missing] == 1]
        if getattr(source, "target", None) is aten.expand.default:
            before = source.args[0].meta["val"].shape
            broadcast += [i for i, size in enumerate(before, result.dim() - len(before)) if size == 1]
        if any(varies(result, axis) for axis in broadcast if axis >= 0):
            self._owners.freeze(operand, f"broadcast over other neurons by {described(node)}")
            return result
        return self._owners.unite(result, spread)

    def _divide(self, node: fx.Node, x: Any, divisor: Any, **kwargs: Any) -> Tensor:
        """A removed divisor would divide by zero."""
        if isinstance(divisor, Tensor) and (divisor != NOBODY).any() and divisor.numel() > 1:
            unknown: Tensor = self._unknown(node, x, divisor, reason=f"{described(node)} divides by it")
            return unknown
        return self._pointwise(node, x, divisor, **kwargs)

    def _prelu(self, node: fx.Node, x: Tensor, slope: Tensor) -> Tensor:
        if slope.numel() > 1:
            self._per_channel(x, slope)
        return x

    def _per_channel(self, x: Tensor, values: Tensor) -> None:
        """Records that values, [C], belong to the channels at axis 1."""
        self._owners.unite(x, along(values, 1, x.dim()).expand_as(x))

    def _pool(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        rank = POOLS[packet_of(node)]
        first = self._owners.unite_along(x, range(x.dim() - rank, x.dim()))
        return self._filled(node, first)

    def _sample(self, node: fx.Node, x: Tensor, places: Tensor, *args: Any) -> Tensor:
        """Looks up positions of every channel; the positions themselves are no channels."""
        self._owners.freeze(places, f"tells {described(node)} where to look")
        sampled: Tensor = self._filled(node, self._owners.unite_along(x, range(2, x.dim())))
        return sampled

    def _reduce(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, Tensor) for a in args):  # the larger one of two
            return self._pointwise(node, x, *args)
        return self._reduced(node, x, self._axes(node, x.dim(), args, kwargs), terms=packet_of(node) in SUMS)

    def _similarity(self, node: fx.Node, a: Tensor, b: Tensor, dim: int = 1, *args: Any) -> Any:
        """The cosine of two vectors is of sums over their elements."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return self._reduced(node, self._owners.unite(a.expand(shape), b.expand(shape)), [dim % len(shape)], terms=True)

    def _reduced(self, node: fx.Node, x: Tensor, axes: Sequence[int], *, terms: bool) -> Any:
        """Of what is taken together along axes; a removed element does not matter where it is a term of a sum."""
        kept = [axis for axis in range(x.dim()) if axis not in axes]
        if any(varies(x, axis) for axis in axes) and not any(varies(x, axis) for axis in kept):
            if terms:
                self._owners.contract(x)
            else:
                self._owners.freeze(x, f"taken together by {described(node)}, which would change")
            return self._filled(node, torch.tensor(NOBODY))
        first = self._owners.unite_along(x, axes)
        return pytree.tree_map_only(Tensor, lambda v: first.reshape(self._trace.concrete(v.shape)), node.meta["val"])

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
            self._owners.freeze(x, f"taken together by {described(node)}, which would change")
        return x

    def _matmul(self, node: fx.Node, a: Tensor, b: Tensor) -> Tensor:
        rank = max(a.dim(), b.dim())
        if min(a.dim(), b.dim()) < 2:
            unknown: Tensor = self._unknown(node, a, b)
            return unknown
        a, b = (x[(None,) * (rank - x.dim())] for x in (a, b))
        return self._contract(node, matmul(rank), (a, b), node.args)

    def _einsum(self, node: fx.Node, equation: str, operands: list[Tensor], **kwargs: Any) -> Tensor:
        product = Product.parsed(equation) if len(operands) == 2 else None
        if product is None:
            unknown: Tensor = self._unknown(node, operands)
            return unknown
        sources: Any = node.args[1]
        return self._contract(node, product, operands, sources)

    def _attention(
        self, node: fx.Node, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if query.shape[:-2] != key.shape[:-2]:  # several queries share a key
            unknown: Tensor = self._unknown(node, query, key, value, attn_mask)
            return unknown
        product = matmul(query.dim())
        scores = self._contract(node, product, (query, key.transpose(-1, -2)), node.args[:2])
        if attn_mask is not None:
            scores = self._combine(node, scores, attn_mask, None)
        return self._contract(node, product, (scores, value), (None, node.args[2]))

    def _contract(self, node: fx.Node, product: Product, factors: Sequence[Tensor], sources: Sequence[Any]) -> Tensor:
        """The owners of a product; a factor that is stored in the model stays whole."""
        stored = [isinstance(i, fx.Node) and self._stored.holds(i) for i in sources]
        if all(stored) or not any(stored):
            a, b = factors
            return contract(self._owners, product, a, b, f"multiplied with what cannot go by {described(node)}")
        reason = f"{described(node)} multiplies with a parameter"
        own = stored.index(True)
        self._freeze_sources(sources[own], reason)
        sizes = dict(zip((product.a, product.b)[own], factors[own].shape, strict=True))
        spanned = [axis for axis, c in enumerate((product.a, product.b)[1 - own]) if sizes.get(c, 1) > 1]
        whole = torch.tensor(NOBODY).expand(factors[own].shape)
        other = self._owners.span(factors[1 - own], spanned, reason)
        a, b = (whole, other) if own == 0 else (other, whole)
        result = contract(self._owners, product, a, b, reason)
        passes = any(varies(result, axis) for axis in range(result.dim()))
        return result if passes else fixed(self._owners, self._trace.shape(node), reason)
