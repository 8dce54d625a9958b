"""Coupled neurons as data: which slices of which parameters are removed together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Role = Literal["writes", "reads", "width"]
"""What a slice is to its neurons: rows, biases and norms that ride along "write" them, columns "read" them, and a
"width" is an integer attribute of a module that counts them."""


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one axis of a parameter or buffer that belongs to a group.

    Attributes:
        tensor: qualified name of the parameter or buffer, or of an integer attribute that says how long an axis is.
        dim: the axis; 0 for an attribute.
        neuron: int64 [size of that axis]: the group's neuron each index belongs to, -1 for none.
        role: what it is to the group.
    """

    tensor: str
    dim: int
    neuron: Tensor
    role: Role

    def indices(self, neurons: Tensor) -> Tensor:
        """The indices along ``dim`` that belong to any of ``neurons`` (int64), ascending."""
        return torch.isin(self.neuron, neurons).nonzero().flatten()

    @property
    def multiplicity(self) -> int:
        """How many indices each neuron of the group owns; the same for all of them."""
        return int((self.neuron == 0).sum())


@dataclass(frozen=True, eq=False)
class Group:
    """Neurons that are interchangeable in the graph: each owns as many indices of the same axes as any other.

    Attributes:
        name: module name of the first writer in execution order.
        size: number of neurons, ordered by their first row in that writer.
        writers: qualified names of the weights whose rows write the neurons, in execution order.
        slices: everything that is removed with a neuron: rows, biases, readers' columns, batch norms' entries.
        frozen: why these neurons cannot be removed, or None.
    """

    name: str
    size: int
    writers: tuple[str, ...]
    slices: tuple[Slice, ...]
    frozen: str | None

    def rows(self, tensor: str) -> Tensor:
        """int64 [size, multiplicity]: each neuron's indices along the axis of ``tensor`` that writes it."""
        return rows_by_neuron(self.written(tensor).neuron, self.size)

    def written(self, tensor: str) -> Slice:
        """The slice of a tensor that writes the group; KeyError where there is none."""
        for s in self.slices:
            if s.tensor == tensor and s.role == "writes":
                return s
        raise KeyError(f"group {self.name} is not written by {tensor}")

    def read(self, tensor: str) -> Slice:
        """The slice of a tensor that reads the group; KeyError where there is none."""
        for s in self.slices:
            if s.tensor == tensor and s.role == "reads":
                return s
        raise KeyError(f"group {self.name} is not read by {tensor}")

    @property
    def readers(self) -> tuple[str, ...]:
        """Qualified names of the weights whose columns read the neurons, in execution order."""
        return tuple(dict.fromkeys(s.tensor for s in self.slices if s.role == "reads"))

    @property
    def members(self) -> tuple[str, ...]:
        """Module names whose outputs are the group's neurons: the writers and the norms that ride along."""
        return tuple(dict.fromkeys(module_of(s.tensor) for s in self.slices if s.role == "writes"))


def rows_by_neuron(neuron: Tensor, size: int) -> Tensor:
    """int64 [size, multiplicity] from the map index -> neuron of a slice."""
    owned = (neuron >= 0).nonzero().flatten()
    order = owned[torch.argsort(neuron[owned], stable=True)]
    return order.view(size, -1)


def module_of(tensor: str) -> str:
    """Name of the module that holds a parameter or buffer."""
    return tensor.rpartition(".")[0]


def own_name(tensor: str) -> str:
    """Name that a parameter or buffer has in the module that holds it."""
    return tensor.rpartition(".")[2]


def qualified(module: str, name: str) -> str:
    """Name in the whole model of what a module holds; the model's own name is empty."""
    return f"{module}.{name}" if module else name


def groups_of(layer: str, groups: Iterable[Group]) -> list[Group]:
    """The groups that own rows of a module, by its first name.

    Raises:
        ValueError: it has no neurons.
    """
    found = [g for g in groups if layer in g.members]
    if not found:
        raise ValueError(
            f"expected a layer with neurons (convolution, linear or batch norm with weights of its own), got {layer!r}"
        )
    return found


def in_layer_order(layer: str, parts: list[tuple[Group, Tensor]]) -> Tensor:
    """Concatenates values per neuron of several groups, ordered by the neurons' first row in ``layer``."""
    first_rows = []
    for group, _ in parts:
        tensor = next(s.tensor for s in group.slices if s.role == "writes" and module_of(s.tensor) == layer)
        first_rows.append(group.rows(tensor)[:, 0])
    return torch.cat([values for _, values in parts])[torch.cat(first_rows).argsort()]
