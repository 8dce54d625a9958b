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

NOBODY = 0


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
        """Says that a[i] and b[i] are one neuron wherever both have an owner; returns the owners of the union."""
        shape = a.shape
        a, b = (self._root[x] for x in collapsed(a, b))
        pairs = _pairs(a, b)
        if pairs is not None:
            self._join(pairs)
        return tidied(self._root[torch.where(a == NOBODY, b, a)]).expand(shape)

    def unite_along(self, owners: Tensor, axes: Iterable[int]) -> Tensor:
        """Unites what differs along ``axes`` only and returns one owner for each (axes kept, size 1)."""
        first = representative(owners, axes)
        self.unite(first.expand_as(owners), owners)
        return first

    def channels(self, owners: Tensor, axis: int) -> Tensor:
        """int64 [C]: one owner per index of ``axis``, everything else united."""
        axis = axis % owners.dim()
        return self.unite_along(owners, (i for i in range(owners.dim()) if i != axis)).flatten()

    def unite_parts(self, owners: Tensor, parts: int) -> Tensor:
        """Unites position i of every one of ``parts`` equal parts of [C]; returns the owners of the first part."""
        first, *others = owners.chunk(parts)
        for other in others:
            self.unite(first, other)
        return first

    def box(self, owners: Tensor, keep: int | None = None) -> None:
        """Says that a tensor stays rectangular: in the end each neuron owns whole slabs along one axis.

        Args:
            owners: of a tensor, or of some of its axes.
            keep: along which axis, if owners come to differ along several; the last one by default.
        """
        owners = squeezed(owners)
        if sum(size > 1 for size in owners.shape) > 1:
            self._boxes.append(Box(owners, keep))

    def match(self, operands: Iterable[Tensor], axis: int) -> None:
        """Says that tensors keep a common length of ``axis``: what owns index i of one owns it of the others."""
        parts = [part.movedim(axis, 0).flatten(1) for part in operands]
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
        """int64 [ids]: the smallest id each id is united with, after all boxes and matches hold."""
        while True:
            # which axis a box keeps decides what its neurons are, and so what they match
            pairs = [p for box in self._boxes if (p := box.pairs(self._root)) is not None]
            pairs = pairs or [p for match in self._matches for p in match.pairs(self._root)]
            if not pairs:
                return self._root
            self._join(torch.cat(pairs, 1))

    def _join(self, pairs: Tensor) -> None:
        a, b = pairs
        label = self._root
        while True:
            least = torch.minimum(label[a], label[b])
            update = label.scatter_reduce(0, label[a], least, "amin").scatter_reduce(0, label[b], least, "amin")
            update = update[update]
            if torch.equal(update, label):
                break
            label = update
        self._root = label


@dataclass(frozen=True, eq=False)
class Box:
    """Owners that must come to differ along one axis only; see :meth:`Owners.box`."""

    owners: Tensor
    keep: int | None

    def pairs(self, label: Tensor) -> Tensor | None:
        """What has yet to be united, [2, n]."""
        owners = label[self.owners]
        varying = [axis for axis in range(owners.dim()) if varies(owners, axis)]
        if len(varying) < 2:
            return None
        keep = self.keep if self.keep in varying else varying[-1]
        first = representative(owners, [axis for axis in varying if axis != keep])
        return _pairs(first.expand_as(owners), owners)


@dataclass(frozen=True, eq=False)
class Match:
    """Tensors of one length, [n, ...] each, that shrink together; see :meth:`Owners.match`."""

    parts: tuple[Tensor, ...]

    def pairs(self, label: Tensor) -> list[Tensor]:
        """What has yet to be united."""
        along = [part for part in (label[p] for p in self.parts) if lie_along(part, 0, repeated=True)]
        if len(along) < 2:
            return []
        whole = torch.cat(along, 1)
        found = _pairs(representative(whole, [1]).expand_as(whole), whole)
        return [] if found is None else [found]


def _pairs(a: Tensor, b: Tensor) -> Tensor | None:
    """[2, n]: the ids that differ between two mirrors, or None where there are none."""
    differ = (a != b) & (a != NOBODY) & (b != NOBODY)
    return torch.unique(torch.stack([a[differ], b[differ]]), dim=1) if differ.any() else None


def collapsed(*mirrors: Tensor) -> tuple[Tensor, ...]:
    """The mirrors (of one shape) with one index left of every axis along which none of them is written out."""
    for axis in range(mirrors[0].dim()):
        if all(m.stride(axis) == 0 for m in mirrors) and mirrors[0].size(axis):
            mirrors = tuple(m.narrow(axis, 0, 1) for m in mirrors)
    return mirrors


def tidied(owners: Tensor) -> Tensor:
    """The same owners, with no axis written out along which they do not differ."""
    small = owners
    for axis in range(owners.dim()):
        if small.size(axis) > 1 and small.stride(axis) != 0:
            first, last = small.narrow(axis, 0, 1), small.narrow(axis, small.size(axis) - 1, 1)
            # most that differ at all differ here
            small = first if torch.equal(first, last) and bool((small == first).all()) else small
    return small.expand(owners.shape)


def representative(owners: Tensor, axes: Iterable[int]) -> Tensor:
    """One owner for each index of the other axes (``axes`` kept, size 1); nobody where there are no elements."""
    for axis in axes:
        if owners.size(axis) == 0:
            shape = list(owners.shape)
            shape[axis] = 1
            owners = owners.new_full(shape, NOBODY)
        # an element nobody owns (padding) must not stand for its axis
        one = owners.stride(axis) == 0 and owners.size(axis) > 0
        owners = owners.narrow(axis, 0, 1) if one else owners.amax(axis, keepdim=True)
    return owners


def squeezed(owners: Tensor) -> Tensor:
    """The owners with one index left of each axis along which they do not differ; all axes stay."""
    for axis in range(owners.dim()):
        if not varies(owners, axis):
            owners = representative(owners, [axis])
    return owners


def varies(owners: Tensor, axis: int) -> bool:
    """Whether owned elements differ along an axis."""
    if owners.size(axis) < 2 or owners.stride(axis) == 0:
        return False
    first, last = owners.select(axis, 0), owners.select(axis, owners.size(axis) - 1)
    if bool(((first != last) & (first != NOBODY) & (last != NOBODY)).any()):
        return True  # most that differ at all differ here
    largest = owners.amax(axis, keepdim=True)
    return bool(((owners != largest) & (owners != NOBODY)).any())


def lie_along(owners: Tensor, axis: int, repeated: bool = False) -> bool:
    """Whether neurons lie along ``axis``, one or more at every index, rather than positions of all of them.

    If ``repeated``, one may lie at several indices, as it does where every group of a convolution holds a part of it.
    """
    if owners.stride(axis) == 0 and owners.size(axis) > 1:
        return False
    slabs = [slab[slab != NOBODY].unique() for slab in owners.unbind(axis)]
    owned = [slab for slab in slabs if len(slab)]
    if len(owned) == 1:
        return len(owned[0]) == 1  # the only neuron there is may as well be the only channel
    if repeated:
        owned = list({tuple(slab.tolist()): slab for slab in owned}.values())
    return len(owned) > 1 and len(torch.cat(owned).unique()) == sum(map(len, owned))
