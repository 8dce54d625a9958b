"""Where the output of a layer joins the rest of the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from .layer import Layer, is_layer, layer_at
from .nodes import ancestors, packet_of
from .operators import aten
from .trace import Trace

# return their input unchanged, in eval mode
_SAME = (aten.clone, aten.alias, aten.detach, aten.contiguous, aten.dropout)


@dataclass(frozen=True, eq=False)
class Point:
    """A layer at one of the places where it is used, and the value that its output is a part of there.

    Attributes:
        layer: with its batch norm, where one follows.
        total: the sum that the output is a term of, as in a residual block; the output itself where there is none.
        other: the other term; None where there is none.
    """

    layer: Layer
    total: fx.Node
    other: fx.Node | None


def find_points(trace: Trace, weight: str) -> list[Point] | str:
    """The points of a weight in a trace, one for each use, in execution order; or why it cannot be refitted."""
    calls = trace.calls(weight)
    if not calls:
        return "it is not used in eval mode"
    for call in calls:
        if not is_layer(call) or trace.parameter(call, 1, "weight") != weight:
            return f"it is no convolution or linear layer but {call.target}"
    layers = [layer_at(trace, call, weight, torch.empty(0, 0, dtype=torch.int64)) for call in calls]
    if len(calls) == 1:
        return [_point(layers[0])]
    if ancestors(i for call in calls for i in call.all_input_nodes).intersection(calls):
        return "it reads what it has written itself"
    if len({(packet_of(layer.call), *_channels(layer)) for layer in layers}) > 1:
        return "it is used as different layers"
    return [_apart(point, calls) for point in map(_point, layers)]


def _channels(layer: Layer) -> tuple[int, int]:
    """How many channels go in and out."""
    inward, outward = (node.meta["val"].shape[layer.axis] for node in (layer.x, layer.call))
    return inward, outward


def _apart(point: Point, calls: Sequence[fx.Node]) -> Point:
    """The point itself; without the sum where the other term comes from another use of the layer, and changes, too."""
    if point.other is None or ancestors([point.other]).isdisjoint(calls):
        return point
    return Point(point.layer, point.layer.output, None)


def _point(layer: Layer) -> Point:
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
