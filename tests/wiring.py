"""Networks wired ad hoc for tests of the graph, and what their groups look like in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from networks import randomised
from torch import Tensor, nn

from singe.graph.analysis import find_groups
from singe.graph.groups import Group
from singe.graph.trace import Trace, trace


class Wired(nn.Module):
    """Named modules and a function (self, x) that wires them."""

    def __init__(self, wiring: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            setattr(self, name, module)
        randomised(self)

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def groups_of(model: nn.Module, x: Tensor) -> dict[str, Group]:
    return {g.name: g for g in find_groups(trace(model, x))}


def owned(group: Group) -> dict[str, int]:
    """{"tensor@axis": indices a neuron}."""
    return {f"{s.tensor}@{s.dim}": s.multiplicity for s in group.slices}


def once(*axes: str) -> dict[str, int]:
    """One index a neuron of every axis; "conv.weight" alone means its rows."""
    return {a if "@" in a else f"{a}@0": 1 for a in axes}


def frozen(groups: dict[str, Group]) -> dict[str, str]:
    return {g.name: g.frozen for g in groups.values() if g.frozen is not None}


def free(groups: dict[str, Group]) -> dict[str, int]:
    return {g.name: g.size for g in groups.values() if g.frozen is None}


def run(graph: Trace, model: nn.Module, x: Tensor) -> Any:
    env = graph.live(model) | graph.feed(x)
    graph.run(graph.nodes, env, len(x), keep=graph.outputs)
    return graph.unflatten([env[n] for n in graph.outputs], len(x))
