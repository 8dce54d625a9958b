"""Who owns each element of each activation: neurons found by running the graph on integers.

Every activation is mirrored by an int64 tensor of its own shape that holds, per element, the id of the neuron it
belongs to. Data movement moves ids, sums unite them (union-find), weights read and write them. A layer's output has one
owner per channel, so its mirror is expanded along all other axes and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .mirrors import NO_PAIRS, NOBODY, collapsed, lie_along, linked, pairs, representative, squeezed, tidied, varies


class Owners:
    """Issues, unites and freezes neuron ids."""

    def __init__(self) -> None:
        self._root = torch.zeros(1, dtype=torch.int64)  # the smallest id that each is united with
        self._boxes: list[Box] = []
        self._matches: list[Match] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.contracted: list[Tensor] = []

    def issue(self, shape: Sequence[int]) -> Tensor:
        """Fresh ids, one per element of ``shape``."""
        first = len(self._root)
        ids = torch.arange(first, first + int(torch.Size(shape).numel()))
        self._root = torch.cat([self._root, ids])
        return ids.view(shape)

    # -- what is one neuron ----------------------------------------------------------------------------------

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """Records that a[i] and b[i] are one neuron wherever both have an owner; returns the owners of the union."""
        shape = a.shape
        a, b = (self._root[x] for x in collapsed(a, b))
        self._root = linked(self._root, pairs(a, b))
        return tidied(self._root[torch.where(a == NOBODY, b, a)]).expand(shape)

    def unite_along(self, owners: Tensor, axes: Iterable[int]) -> Tensor:
        """Unites owners that differ only along ``axes`` and returns one for each (axes kept, size 1)."""
        first = representative(owners, axes)
        self.unite(first.expand_as(owners), owners)
        return first

    def channels(self, owners: Tensor, axis: int) -> Tensor:
        """int64 [C]: one owner per index of ``axis``, everything else united."""
        axis = axis % owners.dim()
        return self.unite_along(owners, (i for i in range(owners.dim()) if i != axis)).flatten()

    def span(self, owners: Tensor, axes: Sequence[int], reason: str) -> Tensor:
        """Unites owners that differ along ``axes``; freezes them where nothing else tells them apart."""
        if not any(varies(owners, axis) for axis in axes):
            return owners
        if any(varies(owners, axis) for axis in range(owners.dim()) if axis not in axes):
            return self.unite_along(owners, axes).expand_as(owners)
        self.freeze(owners, reason)
        return owners

    def unite_parts(self, owners: Tensor, parts: int) -> Tensor:
        """Unites position i of every one of ``parts`` equal parts of [C]; returns the owners of the first part."""
        first, *others = owners.chunk(parts)
        for other in others:
            self.unite(first, other)
        return first

    def box(self, owners: Tensor, keep: int | None = None) -> None:
        """Requires that a tensor stays rectangular: in the end each neuron owns whole slabs along one axis.

        Args:
            owners: of a tensor, or of some of its axes.
            keep: along which axis, if owners come to differ along several; the last one by default.
        """
        owners = squeezed(owners)
        if sum(size > 1 for size in owners.shape) > 1:
            self._boxes.append(Box(owners, keep))

    def match(self, operands: Iterable[Tensor], axis: int) -> None:
        """Requires a common length of ``axis``: the owner of index i of one tensor owns it in the others, too."""
        parts = [part.movedim(axis, 0).reshape(part.shape[axis], -1) for part in operands]
        parts = [part for part in parts if len(part) > 1]
        if len(parts) > 1:
            self._matches.append(Match(tuple(parts)))

    # -- what stays ------------------------------------------------------------------------------------------

    def freeze(self, owners: Tensor, reason: str) -> None:
        """Marks every neuron in ``owners`` as not removable."""
        self.frozen.append((torch.unique(collapsed(owners)[0]), reason))

    def contract(self, owners: Tensor) -> None:
        """Marks neurons as read by an operator without weights: a sum or a product in which they are terms."""
        self.contracted.append(torch.unique(collapsed(owners)[0]))

    # -- the end ---------------------------------------------------------------------------------------------

    def settle(self) -> Tensor:
        """int64 [ids]: the smallest id each id is united with, once all boxes and matches hold."""
        while True:
            # the axis that a box keeps decides what its neurons are, and so what they match
            missing = self._missing(self._boxes)
            missing = missing if missing.numel() else self._missing(self._matches)
            if not missing.numel():
                return self._root
            self._root = linked(self._root, missing)

    def _missing(self, constraints: Sequence[Box | Match]) -> Tensor:
        return torch.cat([NO_PAIRS, *(constraint.missing(self._root) for constraint in constraints)], 1)


@dataclass(frozen=True, eq=False)
class Box:
    """Owners that must come to differ along one axis only; see :meth:`Owners.box`."""

    owners: Tensor
    keep: int | None

    def missing(self, label: Tensor) -> Tensor:
        """int64 [2, n]: what has yet to be united."""
        owners = label[self.owners]
        varying = [axis for axis in range(owners.dim()) if varies(owners, axis)]
        keep = self.keep if self.keep in varying else max(varying, default=None)
        first = representative(owners, [axis for axis in varying if axis != keep])
        return pairs(first.expand_as(owners), owners)


@dataclass(frozen=True, eq=False)
class Match:
    """Tensors of one length, [n, ...] each, that shrink together; see :meth:`Owners.match`."""

    parts: tuple[Tensor, ...]

    def missing(self, label: Tensor) -> Tensor:
        """int64 [2, n]: what has yet to be united."""
        owned = [part for part in (label[p] for p in self.parts) if lie_along(part, 0, repeated=True)]
        if len(owned) < 2:
            return NO_PAIRS
        whole = torch.cat(owned, 1)
        return pairs(representative(whole, [1]).expand_as(whole), whole)
