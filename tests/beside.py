"""Small networks side by side as one, of which there is one export for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Beside(nn.Module):
    """Networks on the same input; the outputs are a tuple of theirs."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return tuple(network(x) for network in self.networks.values())


def inside(case: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What is known by names in one of the networks, by names in all of them."""
    return {f"networks.{case}.{name}": value for name, value in named.items()}


def inside_all(known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for case, named in known.items() for name, value in inside(case, named).items()}


def without_place(case: str, reason: str) -> str:
    """A reason as one of the networks has it by itself."""
    return reason.replace(f"networks.{case}.", "").replace(f" in networks.{case}", "")
