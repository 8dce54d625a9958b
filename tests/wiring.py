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
from singe.graph.trace import Trace, plain_call, trace
from singe.removal.trial import Trials


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


class Attention(nn.Module):
    """Whole heads can go if the code asks its attributes how many there are."""

    def __init__(self, by_attribute: bool, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 3, 4, 12
        self.by_attribute, self.fused = by_attribute, fused
        self.qkv, self.proj = nn.Linear(5, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        heads = self.num_heads if self.by_attribute else 3
        q, k, v = self.qkv(x).reshape(b, n, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, self.attn_dim))


class BiasedAttention(Attention):
    """Adds to what each head sees what a table has for it, by the distance of positions."""

    def __init__(self) -> None:
        super().__init__(True, False)
        self.table = nn.Parameter(torch.randn(13, 3))
        self.register_buffer("places", torch.arange(7)[:, None] - torch.arange(7)[None] + 6)

    def forward(self, x: Tensor) -> Tensor:
        b, n = x.shape[:2]
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        mixed = ((q @ k.transpose(-2, -1)) + bias.unsqueeze(0)).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


def unsafe_groups(model, groups, inputs, forward=plain_call):
    """The groups whose removal does not equal masking them -> why."""
    return Trials(model, inputs, forward).unsafe(groups)
