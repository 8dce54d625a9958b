"""Layers whose groups are written out by hand, for tests of counting and sharing out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from singe.graph.groups import Group, Slice


def chain(widths: Sequence[int]) -> tuple[nn.Sequential, list[Group]]:
    """Linear layers of these widths, and the group of each but the last."""
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    groups = []
    for i, width in enumerate(widths[1:-1]):
        own = torch.arange(width)
        slices = (
            Slice(f"{i}.weight", 0, own, "writes"),
            Slice(f"{i}.bias", 0, own, "writes"),
            Slice(f"{i + 1}.weight", 1, own, "reads"),
        )
        groups.append(Group(str(i), width, (f"{i}.weight",), slices, None))
    return model, groups


def group_of(*layers: str, size: int = 4, rows: int = 1) -> Group:
    """A group that some layers write together, with so many rows a neuron in each."""
    own = torch.arange(size).repeat_interleave(rows)
    weights = tuple(f"{layer}.weight" for layer in layers)
    return Group(layers[0], size, weights, tuple(Slice(w, 0, own, "writes") for w in weights), None)
