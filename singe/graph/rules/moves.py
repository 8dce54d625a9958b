"""Operators that only move elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..mirrors import NOBODY, along, lie_along, representative, varies
from ..nodes import described, kind_of, place_of
from ..operators import aten
from ..trace import evaluate
from .base import Base


class Moves(Base):
    """Views, splits, concatenations, padding and the like."""

    def _move(self, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
        places = [self._known(*pair) for pair in zip(args, node.args[1:], strict=True)]
        if any(isinstance(place, fx.Node) for place in places):
            return self._unknown(node, x)
        moved = evaluate(node, (x, *places), kwargs)
        self._note_widths(node, x, *pytree.tree_leaves(moved))
        return moved

    def _known(self, argument: Any, source: Any) -> Any:
        """The value of an argument that says which elements to pick; its node where the value is not known."""
        if not isinstance(argument, Tensor):
            return argument
        value = self._stored.value(source)
        return source if value is None else value

    def _view(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """An axis that a view splits stays rectangular: all parts lose the same, or whole parts are removed."""
        out: Tensor = evaluate(node, (x, *args), kwargs)
        self._note_widths(node, x, out)
        for axes in _axes_of_parts(x.shape, out.shape):
            part = representative(out, (i for i in range(out.dim()) if i not in axes))
            if sum(varies(part, axis) for axis in axes) < 2:
                continue
            if kind_of(node) == "MultiheadAttention":
                self._owners.freeze(part, "torch.nn.MultiheadAttention takes as many channels as it has heads for")
            # where as many tensors as heads lie in one, they come first
            self._owners.box(part, next(reversed(self._heads(node, out, axes)), None))
        return out

    def _heads(self, node: fx.Node, out: Tensor, axes: list[int]) -> list[int]:
        """The axes along which heads may lie, by the module's attributes: how many there are, or how wide each is."""
        attributes = {n: v for n, v in self._trace.attributes.get(place_of(node), {}).items() if "head" in n}
        width = {name: value for name, value in attributes.items() if "dim" in name or "size" in name}
        counts = [value for name, value in attributes.items() if name not in width]
        wide = [axis for axis in axes if out.shape[axis] in width.values()]
        others = [axis for axis in axes if axis not in wide[-1:]]
        return [axis for axis in others if out.shape[axis] in counts] or (others if wide else [])

    def _split(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Parts of one size are halves, thirds ...: all of them lose a channel or the split would move."""
        parts = evaluate(node, (x, *args), kwargs)
        self._note_widths(node, x, *parts)
        for part in parts[1:]:
            if all(p.shape == part.shape for p in parts):
                self._owners.unite(parts[0], part)
        return parts

    def _shuffle(self, node: fx.Node, x: Tensor, groups: int) -> Tensor:
        """Parts are interleaved: all of them lose a channel or the others would change places."""
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

    def _beside_constants(self, node: fx.Node, owners: Tensor, inside: Tensor) -> Tensor:
        """Issues frozen owners for constants that lie along an axis of neurons: the others could be removed, not these.

        Constants beside positions of one neuron, such as the zeros around an image, belong to nobody.
        """
        if inside.all() or not inside.any():
            return owners
        for axis in range(owners.dim()):
            slabs = inside.movedim(axis, 0).flatten(1).any(1)
            if not slabs.all() and _is_channels(owners, axis):
                issued = self._owners.issue((len(slabs),))
                self._owners.freeze(issued[~slabs], f"joins constants of a fixed width ({described(node)})")
                owners = torch.where(along(slabs, axis, owners.dim()), owners, along(issued, axis, owners.dim()))
        return owners

    def _constant(self, node: fx.Node, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(NOBODY).expand(self._trace.shape(node))

    def _identity(self, node: fx.Node, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x, x) if isinstance(node.meta["val"], tuple) else x.expand(self._trace.shape(node))


def _axes_of_parts(before: torch.Size, after: torch.Size) -> list[list[int]]:
    """For each axis (or run of axes) that a view splits, the axes of the result that it becomes."""
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
