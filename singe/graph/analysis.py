"""From a trace to its groups: runs the graph once on owners."""

from __future__ import annotations

import torch

from .groups import Group
from .owners import Owners, Weight
from .rules import Rules
from .trace import Env, Trace


def find_groups(trace: Trace) -> list[Group]:
    """Every group of coupled neurons in the network, frozen ones with their reason, in execution order."""
    return analyse(trace)[0]


def analyse(trace: Trace) -> tuple[list[Group], dict[str, str]]:
    """The groups of :func:`find_groups`, and the modules whose weights write no neuron of any of them -> why."""
    owners = Owners()
    rules = Rules(owners, trace)
    env: Env = {node: Weight(name, tuple(node.meta["val"].shape)) for node, name in trace.state.items()}
    env |= {node: torch.zeros(value.shape, dtype=torch.int64) for node, value in trace.constants.items()}
    for node in trace.inputs:
        shape = trace.shape(node, trace.example_batch)
        pixels = owners.issue((1, *shape[1:]))
        owners.freeze(pixels, "network input")
        env[node] = pixels.expand(shape).contiguous()
    trace.run(trace.nodes, env, trace.example_batch, keep=trace.outputs, call=rules.apply)
    for node in trace.outputs:
        if isinstance(env[node], Weight):
            owners.freeze_tensor(env[node], "network output")
        else:
            owners.freeze(env[node], "network output")
    return owners.groups(), owners.unfollowed()
