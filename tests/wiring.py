"""Networks wired ad hoc for tests of the graph, and what their groups look like in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from networks import randomised
from torch import Tensor, nn
from torch.nn import functional as F

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


class Assembled(nn.Module):
    """A network from a list of stages (kind, width), for images [B, 3, 6, 6]."""

    KINDS = ("conv", "residual", "project", "concat", "gate", "twice")

    def __init__(self, stages: list[tuple[str, int]], tail: str) -> None:
        super().__init__()
        self.kinds, self.tail = [kind for kind, _ in stages], tail
        self.stem, channels = nn.Conv2d(3, 4, 3, padding=1), 4
        self.stages = nn.ModuleList()
        for kind, width in stages:
            parts, channels = self._stage(kind, width, channels)
            self.stages.append(nn.ModuleList(parts))
        self.hidden = nn.Linear(channels * (9 if tail == "flatten" else 1), 5)
        self.head = nn.Linear(5, 3)
        randomised(self)

    @staticmethod
    def _stage(kind: str, w: int, c: int) -> tuple[list[nn.Module], int]:
        if kind == "conv":
            return [nn.Conv2d(c, w, 3, padding="same"), nn.BatchNorm2d(w)], w
        if kind == "residual":
            return [nn.BatchNorm2d(c), nn.Conv2d(c, w, 1), nn.Conv2d(w, c, 3, padding=1, bias=False)], c
        if kind == "project":
            return [nn.Conv2d(c, w, 3, padding=1, bias=False), nn.BatchNorm2d(w, affine=False), nn.Conv2d(c, w, 1)], w
        if kind == "concat":
            return [nn.Conv2d(c, w, 1)], c + w
        if kind == "gate":
            return [nn.Linear(c, w), nn.Linear(w, c)], c
        return [nn.Conv2d(2 * c, w, 1)], w

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        for kind, m in zip(self.kinds, self.stages, strict=True):
            if kind == "conv":
                x = F.relu(m[1](m[0](x)))
            elif kind == "residual":
                x = x + m[2](F.relu(m[1](m[0](x)))).mul_(0.5)
            elif kind == "project":
                x = F.relu(m[1](m[0](x)), inplace=True) + m[2](x)
            elif kind == "concat":
                x = torch.cat([x, torch.tanh(m[0](x))], 1)
            elif kind == "gate":
                x = x * torch.sigmoid(m[1](F.silu(m[0](x.mean((2, 3))))))[:, :, None, None]
            else:
                x = F.gelu(m[0](torch.cat([x, F.relu(-x)], 1)))
        x = F.max_pool2d(x, 2) if self.tail == "flatten" else x.mean((2, 3))
        return self.head(torch.sigmoid(self.hidden(x.flatten(1))))
