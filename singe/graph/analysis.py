"""From a trace to its groups: runs the graph once on owners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .claims import Claims, StoredTensor
from .groups import Group
from .mirrors import NOBODY
from .nodes import place_of
from .owners import Owners
from .rules import Rules
from .rules.base import fixed
from .trace import Env, Trace

_MEMORY = 2 << 30
"""Bytes that the owners of one value may take."""


def find_groups(trace: Trace) -> list[Group]:
    """Every group of coupled neurons in the network, frozen ones with their reason, in execution order."""
    return analyse(trace)[0]


def analyse(trace: Trace, training: Trace | None = None) -> tuple[list[Group], dict[str, str]]:
    """The groups of a network, and the modules whose weights write no neuron of any of them -> why.

    Args:
        trace: of the network in eval mode.
        training: in train mode, if that has parts which eval mode lacks, such as auxiliary heads.

    Raises:
        ValueError: values are too large to record their owners.
    """
    owners = Owners()
    claims = Claims(owners)
    _follow(trace, owners, claims)
    elsewhere: dict[str, str] = {}
    buffers = trace.buffers
    if training is not None:
        _follow(training, owners, claims)
        buffers = buffers | training.buffers
        idle = set(training.used()) - set(trace.used())
        elsewhere = dict.fromkeys(idle, "used in train mode only, where nothing scores it")
    return claims.groups(elsewhere), claims.unfollowed(buffers)


def _follow(trace: Trace, owners: Owners, claims: Claims) -> None:
    """Runs a trace on owners."""
    rules = Rules(owners, claims, trace)
    env: Env = {node: StoredTensor(name, tuple(node.meta["val"].shape)) for node, name in trace.state.items()}
    env |= {node: torch.tensor(NOBODY).expand(value.shape) for node, value in trace.constants.items()}
    env |= {node: fixed(owners, trace.shape(node), "network input") for node in trace.inputs}

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owned = rules.apply(node, args, kwargs)
        largest = max(
            (t.untyped_storage().nbytes() for t in pytree.tree_leaves(owned) if isinstance(t, Tensor)), default=0
        )
        if largest > _MEMORY:
            raise ValueError(
                f"expected inputs small enough to say who owns each element of each value, but for {node.target} in "
                f"{place_of(node) or 'the model'} that takes {largest >> 20} MiB; smaller images have the same channels"
            )
        return owned

    trace.run(trace.nodes, env, trace.example_batch, keep=trace.outputs, call=call)
    for node in trace.outputs:
        if isinstance(env[node], StoredTensor):
            claims.freeze(env[node], "network output")
        else:
            owners.freeze(env[node], "network output")
