"""Who owns each element of each activation: neurons found by running the graph on integers.

Every activation is mirrored by an int64 tensor of its own shape (batch of two) that holds, per element, the id of the
neuron it belongs to. Data movement moves ids, sums unite them (union-find), weights read and write them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .groups import Group, Slice, module_of

NOBODY = 0


@dataclass(frozen=True)
class Weight:
    """Stands for a parameter or buffer while the graph runs on owners."""

    name: str
    shape: tuple[int, ...]


Footprint = tuple[tuple[tuple[str, int], int], ...]


class Owners:
    """Issues, unites and freezes neuron ids, and remembers which tensor axes they claim."""

    def __init__(self) -> None:
        self._count = 1
        self._pairs: list[Tensor] = []
        self._frozen: list[tuple[Tensor, str]] = []
        self._claims: dict[tuple[str, int], Tensor] = {}
        self._frozen_tensors: dict[Weight, str] = {}
        self._rows: dict[str, Tensor] = {}

    def issue(self, shape: tuple[int, ...]) -> Tensor:
        """Fresh ids, one per element of ``shape``."""
        count = int(torch.Size(shape).numel())
        ids = torch.arange(self._count, self._count + count).view(shape)
        self._count += count
        return ids

    def rows(self, weight: str, size: int) -> Tensor:
        """int64 [size]: the ids of a weight's rows, the same whenever the weight is used."""
        return self.rows_of(weight, self._rows[weight] if weight in self._rows else self.issue((size,)))

    def rows_of(self, weight: str, owners: Tensor) -> Tensor:
        """int64 [size]: says that a weight's rows belong to ``owners``, as those of a depthwise convolution do."""
        if weight in self._rows:
            self.freeze(self._rows[weight], f"the weight {weight} is used more than once")
        self._rows.setdefault(weight, owners)
        self.claim(weight, 0, owners)
        return owners

    def unite(self, a: Tensor, b: Tensor) -> Tensor:
        """Says that a[i] and b[i] are one neuron wherever both have an owner; returns the owners of the union."""
        differ = (a != b) & (a != NOBODY) & (b != NOBODY)
        if differ.any():
            self._pairs.append(torch.unique(torch.stack([a[differ], b[differ]]), dim=1))
        return torch.where(a == NOBODY, b, a)

    def unite_along(self, owners: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Unites what differs along ``axes`` only and returns the owners at index 0 of each (axes kept, size 1)."""
        first = owners
        for axis in axes:
            # an element nobody owns (padding) must not stand for its axis
            first = first.max(axis, keepdim=True).values
        self.unite(first.expand_as(owners), owners)
        return first

    def channels(self, owners: Tensor, axis: int) -> Tensor:
        """int64 [C]: one owner per index of ``axis``, everything else united."""
        axis = axis % owners.dim()
        return self.unite_along(owners, tuple(i for i in range(owners.dim()) if i != axis)).flatten()

    def unite_parts(self, owners: Tensor, parts: int) -> Tensor:
        """Unites position i of every one of ``parts`` equal parts of [C]; returns the owners of the first part."""
        first, *others = owners.chunk(parts)
        for other in others:
            self.unite(first, other)
        return first

    @staticmethod
    def lie_along(owners: Tensor, axis: int) -> bool:
        """Whether neurons lie along ``axis``, one or more at every index of their own, rather than positions."""
        slabs = [slab[slab != NOBODY].unique() for slab in owners.unbind(axis)]
        owned = [slab for slab in slabs if len(slab)]
        if len(owned) == 1:
            return len(owned[0]) == 1  # the only neuron there is may as well be the only channel
        return len(owned) > 1 and len(torch.cat(owned).unique()) == sum(map(len, owned))

    def freeze(self, owners: Tensor, reason: str) -> None:
        """Marks every neuron in ``owners`` as not removable."""
        self._frozen.append((torch.unique(owners), reason))

    def freeze_tensor(self, weight: Weight, reason: str) -> None:
        """Marks every neuron that claims any axis of a parameter as not removable."""
        self._frozen_tensors.setdefault(weight, reason)

    def claim(self, tensor: str, dim: int, owners: Tensor) -> None:
        """Says that index i along ``dim`` of a parameter or buffer belongs to owners[i]."""
        self.unite(self._claims.setdefault((tensor, dim), owners), owners)

    def groups(self) -> list[Group]:
        """The neurons some weight writes, gathered into groups in execution order of their first writer."""
        labels = self._labels()
        footprints = self._footprints(labels)
        frozen = self._frozen_roots(labels, footprints)
        gathered: dict[tuple[Footprint, str | None], list[int]] = defaultdict(list)
        for root in dict.fromkeys(r for ids in self._rows.values() for r in labels[ids].tolist() if r != NOBODY):
            gathered[tuple(footprints[root]), frozen.get(root)].append(root)
        return _unique_names([self._group(roots, key, reason, labels) for (key, reason), roots in gathered.items()])

    def unfollowed(self) -> dict[str, str]:
        """Modules with weights that write no neuron of any group, since an operator without a rule uses them -> why."""
        found: dict[str, str] = {}
        for weight, reason in self._frozen_tensors.items():
            module = module_of(weight.name).partition(".parametrizations")[0]
            if len(weight.shape) > 1 and weight.name not in self._rows:
                found.setdefault(module or weight.name, reason)
        return found

    def _labels(self) -> Tensor:
        """int64 [ids]: the smallest id each id is united with."""
        label = torch.arange(self._count)
        if not self._pairs:
            return label
        a, b = torch.cat(self._pairs, dim=1)
        while True:
            least = torch.minimum(label[a], label[b])
            update = label.scatter_reduce(0, label[a], least, "amin").scatter_reduce(0, label[b], least, "amin")
            update = update[update]
            if torch.equal(update, label):
                return label
            label = update

    def _footprints(self, labels: Tensor) -> dict[int, list[tuple[tuple[str, int], int]]]:
        """For every neuron, how many indices of each claimed axis it owns."""
        footprints: dict[int, list[tuple[tuple[str, int], int]]] = defaultdict(list)
        for axis, owners in self._claims.items():
            roots, counts = torch.unique(labels[owners], return_counts=True)
            for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                footprints[root].append((axis, count))
        return footprints

    def _frozen_roots(self, labels: Tensor, footprints: dict[int, Any]) -> dict[int, str]:
        """The first reason why each neuron cannot be removed."""
        reasons: dict[int, str] = {}
        for ids, reason in self._frozen:
            for root in labels[ids].unique().tolist():
                reasons.setdefault(root, reason)
        by_name = {weight.name: reason for weight, reason in self._frozen_tensors.items()}
        for root, footprint in footprints.items():
            axes = [axis for axis, _ in footprint]
            for tensor, _ in axes:
                if tensor in by_name:
                    reasons.setdefault(root, by_name[tensor])
            if all(dim == 0 for _, dim in axes):
                reasons.setdefault(root, "nothing reads it")
        return reasons

    def _group(self, roots: list[int], footprint: Footprint, frozen: str | None, labels: Tensor) -> Group:
        neuron_of = torch.full((self._count,), -1)
        neuron_of[torch.tensor(roots)] = torch.arange(len(roots))
        axes = [axis for axis, _ in footprint]
        writers = tuple(weight for weight in self._rows if (weight, 0) in axes)
        slices = tuple(Slice(tensor, dim, neuron_of[labels[self._claims[tensor, dim]]]) for tensor, dim in axes)
        return Group(module_of(writers[0]) or writers[0], len(roots), writers, slices, frozen)


def _unique_names(groups: list[Group]) -> list[Group]:
    """Tells apart groups that share their first writer (parts of it are read by different layers)."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        suffix = f"#{seen[group.name]}" if seen[group.name] > 1 else ""
        named.append(Group(group.name + suffix, group.size, group.writers, group.slices, group.frozen))
    return named
