"""Which axes of which parameters, buffers and attributes the neurons of a network own, gathered into groups."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .groups import Group, Role, Slice, module_of
from .mirrors import NOBODY, representative, squeezed
from .owners import Owners

Axis = tuple[str, int]
"""A parameter, buffer or attribute, and one of its axes."""

Footprint = tuple[tuple[Axis, int], ...]
"""How many indices of each axis a neuron owns."""


@dataclass(frozen=True)
class StoredTensor:
    """Stands for a parameter or buffer while the graph runs on owners."""

    name: str
    shape: tuple[int, ...]


class Claims:
    """Remembers what neurons own while the graph runs on owners.

    Args:
        owners: issues and unites the neurons.
    """

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        self._claims: dict[Axis, Tensor] = {}
        self._roles: dict[Axis, set[Role]] = defaultdict(set)
        self._rows: dict[str, Tensor] = {}
        self._elements: dict[str, Tensor] = {}
        self._widths: dict[str, list[Tensor]] = defaultdict(list)
        self._frozen: dict[str, tuple[StoredTensor, str]] = {}

    def claim(self, tensor: str, dim: int, owners: Tensor, role: Role) -> None:
        """Records that index i along ``dim`` of a parameter or buffer belongs to owners[i]."""
        self._owners.unite(self._claims.setdefault((tensor, dim), owners), owners)
        self._roles[tensor, dim].add(role)

    def rows(self, weight: StoredTensor, dim: int) -> Tensor:
        """int64 [rows]: the owners of a weight's rows, which lie along ``dim``; the same whenever it is used."""
        name, size = weight.name, weight.shape[dim]
        if name not in self._rows:
            return self.rows_of(name, dim, self._owners.issue((size,)))
        if "writes" in self._roles[name, dim]:
            return self._claims[name, dim]
        owners = self._owners.issue((size,))  # as a convolution's and a transposed one's, tied
        self.claim(name, dim, owners, "writes")
        self.freeze(weight, f"layers write along different axes of the weight {name}")
        return owners

    def rows_of(self, weight: str, dim: int, owners: Tensor) -> Tensor:
        """int64 [size]: records that a weight's rows belong to ``owners``, as those of a depthwise convolution do."""
        self._rows.setdefault(weight, owners)
        self.claim(weight, dim, owners, "writes")
        return owners

    def elements(self, weight: StoredTensor) -> Tensor:
        """An owner for each element of a parameter or buffer that is an operand like any other."""
        if weight.name not in self._elements:
            self._elements[weight.name] = self._owners.issue(weight.shape)
        return self._elements[weight.name]

    def width(self, attribute: str, owners: Tensor) -> None:
        """Records that an integer attribute may be the number of ``owners`` (int64 [size])."""
        self._widths[attribute].append(owners)

    def freeze(self, weight: StoredTensor, reason: str) -> None:
        """Marks every neuron that owns a part of a parameter as not removable."""
        self._frozen.setdefault(weight.name, (weight, reason))

    # -- the end ---------------------------------------------------------------------------------------------

    def groups(self, elsewhere: Mapping[str, str]) -> list[Group]:
        """The neurons some weight writes, gathered into groups in execution order of their first writer.

        Args:
            elsewhere: weights whose neurons cannot be removed -> why.
        """
        labels = self._settled()
        footprints = self._footprints(labels)
        frozen = self._frozen_roots(labels, footprints, elsewhere)
        gathered: dict[tuple[Footprint, str | None], list[int]] = defaultdict(list)
        for root in dict.fromkeys(r for ids in self._rows.values() for r in labels[ids].tolist() if r != NOBODY):
            gathered[tuple(footprints[root]), frozen.get(root)].append(root)
        return _unique_names([self._group(roots, key, reason, labels) for (key, reason), roots in gathered.items()])

    def unfollowed(self, buffers: Collection[str]) -> dict[str, str]:
        """Modules with weights that write no neuron of any group, because of the operators that use them -> why.

        Args:
            buffers: names of those that are no weights.
        """
        found: dict[str, str] = {}
        for weight, reason in self._frozen.values():
            module = module_of(weight.name).partition(".parametrizations")[0]
            if len(weight.shape) > 1 and weight.name not in self._rows and weight.name not in buffers:
                found.setdefault(module or weight.name, reason)
        return found

    def _settled(self) -> Tensor:
        """The labels of all owners, with every element and width claimed by axis."""
        labels = self._owners.settle()
        written = torch.zeros(len(labels), dtype=torch.bool)
        for rows in self._rows.values():
            written[labels[rows]] = True
        for name, ids in self._elements.items():
            self._claim_axis(name, torch.where(written[labels[ids]], labels[ids], NOBODY))
        for attribute, lengths in self._widths.items():
            self._claim_width(attribute, [labels[ids] for ids in lengths])
        return self._owners.settle()

    def _claim_axis(self, name: str, owners: Tensor) -> None:
        """Finds the axis of a parameter that its neurons lie along."""
        if not (owners != NOBODY).any():
            return
        narrow = squeezed(owners)
        along = [axis for axis, size in enumerate(narrow.shape) if size > 1]
        if len(along) == 1:
            axis = along[0]
            flat = representative(owners, [i for i in range(owners.dim()) if i != axis]).flatten()
            self.claim(name, axis, flat, "writes")
        else:
            self._owners.freeze(owners, f"the parameter {name} does not hold one slice for each neuron")

    def _claim_width(self, attribute: str, lengths: list[Tensor]) -> None:
        """An attribute is cut along if all axes of its length are owned by the same neurons."""
        owned = [owners for owners in lengths if len(owners[owners != NOBODY].unique()) > 1]
        if owned and all(torch.equal(owners, owned[0]) for owners in owned):
            self.claim(attribute, 0, owned[0], "width")

    def _footprints(self, labels: Tensor) -> dict[int, list[tuple[Axis, int]]]:
        """For every neuron, how many indices of each claimed axis it owns."""
        footprints: dict[int, list[tuple[Axis, int]]] = defaultdict(list)
        for axis, owners in self._claims.items():
            roots, counts = torch.unique(labels[owners], return_counts=True)
            for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                footprints[root].append((axis, count))
        return footprints

    def _frozen_roots(self, labels: Tensor, footprints: dict[int, Any], elsewhere: Mapping[str, str]) -> dict[int, str]:
        """The first reason why each neuron cannot be removed."""
        reasons: dict[int, str] = {}
        for ids, reason in self._owners.frozen:
            for root in labels[ids].unique().tolist():
                reasons.setdefault(root, reason)
        by_name = {name: reason for name, (_, reason) in self._frozen.items()}
        contracted = {root for ids in self._owners.contracted for root in labels[ids].unique().tolist()}
        for root, footprint in footprints.items():
            for axis, _ in footprint:
                if axis[0] in by_name:
                    reasons.setdefault(root, by_name[axis[0]])
                if axis[0] in elsewhere and "writes" in self._roles[axis]:
                    reasons.setdefault(root, elsewhere[axis[0]])
                if {"writes", "reads"} <= self._roles[axis]:
                    reasons.setdefault(root, f"the weight {axis[0]} both writes and reads it, along one axis")
            if root not in contracted and not any("reads" in self._roles[axis] for axis, _ in footprint):
                reasons.setdefault(root, "nothing reads it")
        return reasons

    def _group(self, roots: list[int], footprint: Footprint, frozen: str | None, labels: Tensor) -> Group:
        neuron_of = torch.full((len(labels),), -1)
        neuron_of[torch.tensor(roots)] = torch.arange(len(roots))
        axes = [axis for axis, _ in footprint]
        written = {name for name, dim in axes if "writes" in self._roles[name, dim]}
        writers = tuple(weight for weight in self._rows if weight in written)
        slices = tuple(
            Slice(name, dim, neuron_of[labels[self._claims[name, dim]]], self._role(name, dim)) for name, dim in axes
        )
        return Group(module_of(writers[0]) or writers[0], len(roots), writers, slices, frozen)

    def _role(self, name: str, dim: int) -> Role:
        roles = self._roles[name, dim]
        return next(role for role in ("writes", "reads", "width") if role in roles)


def _unique_names(groups: list[Group]) -> list[Group]:
    """Gives different names to groups with the same first writer (different layers read parts of it)."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        suffix = f"#{seen[group.name]}" if seen[group.name] > 1 else ""
        named.append(replace(group, name=group.name + suffix))
    return named
