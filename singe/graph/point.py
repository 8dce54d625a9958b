"""Where a layer's output joins the rest of the network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from .layer import Layer, is_affine, is_transposed, layer_at
from .nodes import packet_of
from .operators import aten
from .trace import Trace

# return their input unchanged, in eval mode
_SAME = (aten.clone, aten.alias, aten.detach, aten.contiguous, aten.dropout)


@dataclass(frozen=True, eq=False)
class Point:
    """A layer that is used once, and the value that its output is a part of.

    Attributes:
        layer: with its batch norm, where one follows.
        total: the sum that the output is a term of, as in a residual block; the output itself where there is none.
        other: the other term; None where there is none.
    """

    layer: Layer
    total: fx.Node
    other: fx.Node | None


def find_point(trace: Trace, weight: str) -> Point | str:
    """The point of a weight in a trace, or why it has none."""
    calls = trace.calls(weight)
    if len(calls) != 1:
        return "its weight is used at several places" if calls else "it is not used in eval mode"
    (call,) = calls
    if is_transposed(call):
        return "transposed convolutions are not refitted"
    if not is_affine(call) or trace.parameter(call, 1, "weight") != weight:
        return f"it is no convolution or linear layer but {call.target}"
    layer = layer_at(trace, call, weight, torch.empty(0, 0, dtype=torch.int64))
    output = layer.output
    end = output
    while len(end.users) == 1:
        (user,) = end.users
        if packet_of(user) in _SAME and user.args[0] is end:
            end = user
        elif packet_of(user) is aten.add and user.kwargs.get("alpha", 1) == 1 and len(user.all_input_nodes) == 2:
            (other,) = (i for i in user.all_input_nodes if i is not end)
            if user.meta["val"].shape == other.meta["val"].shape == output.meta["val"].shape:
                return Point(layer, user, other)
            break
        else:
            break
    return Point(layer, output, None)
