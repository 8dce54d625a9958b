"""Mirrors: int64 tensors of the shapes of a network's activations that say what each element belongs to.

A layer's output belongs to its channels, so its mirror is expanded along all other axes and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NOBODY = 0
"""The id for elements that belong to nothing in particular."""


NO_PAIRS = torch.empty(2, 0, dtype=torch.int64)
"""The pairs to link where there are none."""


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """int64 [2, n]: the pairs of ids that differ between two mirrors where both elements have an owner."""
    differ = (a != b) & (a != NOBODY) & (b != NOBODY)
    if not differ.any():
        return NO_PAIRS
    a, b = a[differ], b[differ]
    count = int(torch.maximum(a.max(), b.max())) + 1
    codes = torch.unique(a * count + b)  # faster than unique columns
    return torch.stack([codes // count, codes % count])


def linked(label: Tensor, pairs: Tensor) -> Tensor:
    """int64 [ids]: the smallest label that each id is linked with, by ``label`` (int64 [ids]) or ``pairs`` ([2, n])."""
    a, b = pairs
    while True:
        least = torch.minimum(label[a], label[b])
        lower = label.scatter_reduce(0, label[a], least, "amin").scatter_reduce(0, label[b], least, "amin")
        lower = lower[lower]
        if torch.equal(lower, label):
            return label
        label = lower


def along(values: Tensor, axis: int, rank: int) -> Tensor:
    """Values [n] as a tensor of ``rank`` axes, all of size 1 but ``axis``."""
    shape = [1] * rank
    shape[axis] = len(values)
    return values.view(shape)


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
        # an element without an owner (padding) must not represent its axis
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

    If ``repeated``, one may lie at several indices, as where every group of a convolution holds a part of it.
    """
    if owners.stride(axis) == 0 and owners.size(axis) > 1:
        return False
    slabs = [slab[slab != NOBODY].unique() for slab in owners.unbind(axis)]
    owned = [slab for slab in slabs if len(slab)]
    if len(owned) == 1:
        return len(owned[0]) == 1  # a single neuron may well be the only channel
    if repeated:
        owned = list({tuple(slab.tolist()): slab for slab in owned}.values())
    return len(owned) > 1 and len(torch.cat(owned).unique()) == sum(map(len, owned))
