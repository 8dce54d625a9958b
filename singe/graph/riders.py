"""What is added to a group's neurons on their way and fades with them: shifts of norms, parameters of their own."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from . import batchnorm
from .groups import Group, Slice
from .nodes import ancestors
from .operators import aten
from .stored import Stored, run
from .trace import Env, Trace, evaluate

# which argument is the shift
_NORMS = {aten.instance_norm.default: 2, aten.group_norm.default: 3, aten.layer_norm.default: 3}


@dataclass(frozen=True, eq=False)
class Rider:
    """An operator that adds something to every neuron that passes through it.

    Attributes:
        node: the operator.
        tensors: qualified names of the parameters or buffers that fade; of a batch norm one that it has.
        neuron: int64, broadcast to the operator's value: the group's neuron each element belongs to, -1 for none.
        addend: the node of the value added; None for a batch norm, which adds beta - a mean.
        sign: the factor of that value.
    """

    node: fx.Node
    tensors: tuple[str, ...]
    neuron: Tensor
    addend: fx.Node | None
    sign: float

    def shift(self, live: Env) -> Tensor:
        """What is added; broadcast like ``neuron``."""
        if self.addend is None:
            return _placed(batchnorm.affine(self.node, live).shift, self.node)
        return _placed(run(self.addend, live), self.node) * self.sign


def find_riders(trace: Trace, group: Group, nodes: Iterable[fx.Node]) -> Iterator[Rider]:
    """The operators among ``nodes`` that add parameters owned by the group to its neurons."""
    stored = Stored(trace)
    owned = {s.tensor: s for s in group.slices if s.role == "writes"}
    for node in nodes:
        if batchnorm.is_plain(node):
            tensor = batchnorm.owned_tensor(trace, node)
            if tensor in owned:
                yield Rider(node, (tensor,), _placed(owned[tensor].neuron, node), None, 1)
            continue
        addend, sign = _addition(node, stored)
        if addend is None or not any(trace.state[i] in owned for i in stored.sources(addend)):
            continue
        if mine := {i: owned[trace.state[i]] for i in _linear_sources(addend, stored) if trace.state[i] in owned}:
            spread = {i: _spread(own, i) for i, own in mine.items()}
            owners = _owners(addend, spread, trace.integers)
            yield Rider(node, tuple(own.tensor for own in mine.values()), _placed(owners, node), addend, sign)


def _addition(node: fx.Node, stored: Stored) -> tuple[fx.Node | None, float]:
    """What is stored, or computed of it, that an operator adds to another value; and its factor."""
    arguments: tuple[Any, ...] = node.args
    if node.target in _NORMS:
        place = _NORMS[node.target]
        return (arguments[place] if len(arguments) > place else None), 1
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or len(node.all_input_nodes) != 2:
        return None, 1
    alpha: Any = node.kwargs.get("alpha", 1)
    signs = (1, alpha if node.target is aten.add.Tensor else -alpha)
    for addend, other, sign in zip(arguments, arguments[::-1], signs, strict=True):
        if stored.holds(addend) and not stored.holds(other):
            return addend, sign
    return None, 1


def _linear_sources(addend: fx.Node, stored: Stored) -> list[fx.Node]:
    """The parameters and buffers with which an addend fades: it is t times as large where all of them are.

    Those of them that are used for something else stay, such as the scale of a batch norm with fixed statistics, whose
    shift is b - m * scale. None where the addend is not linear in the others.
    """
    sources = stored.sources(addend)
    if stored.is_moved(addend):
        return sources
    if not all(i.meta["val"].is_floating_point() for i in sources) or not stored.vanishes(addend):
        return []
    inside = ancestors([addend])
    used = [node for node in inside if node is not addend and not inside.issuperset(node.users)]
    staying = {source for node in used for source in stored.sources(node)}
    random = torch.Generator().manual_seed(0)
    values = {i: 0.5 + torch.rand(i.meta["val"].shape, generator=random, dtype=torch.float64) for i in sources}
    halved = {i: value if i in staying else value / 2 for i, value in values.items()}
    linear = torch.allclose(stored.run(addend, halved), stored.run(addend, values) / 2)
    return [i for i in sources if i not in staying] if linear else []


def _owners(node: fx.Node, known: Env, integers: Env) -> Tensor:
    """The neuron that each element of a stored value belongs to, -1 for none; of a sum or product that of its terms.

    Args:
        node: of the value.
        known: those of the parameters and buffers that belong to neurons; what is found is added.
        integers: the values of indices.
    """
    if node not in known:
        known[node] = _found(node, known, integers)
    value: Tensor = known[node]
    return value


def _found(node: fx.Node, known: Env, integers: Env) -> Tensor:
    if not node.all_input_nodes:  # nobody's
        return torch.tensor(-1).expand(node.meta["val"].shape)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        terms = [_owners(i, known, integers) for i in node.all_input_nodes]
        return functools.reduce(torch.maximum, torch.broadcast_tensors(*terms))
    args = fx.map_arg(node.args, lambda i: integers[i] if i in integers else _owners(i, known, integers))
    result: Tensor = evaluate(node, args, dict(node.kwargs))
    return result


def _spread(owned: Slice, node: fx.Node) -> Tensor:
    """The neuron that each element of a parameter belongs to."""
    shape = [1] * len(node.meta["val"].shape)
    shape[owned.dim] = -1
    return owned.neuron.view(shape).expand(tuple(node.meta["val"].shape))


def _placed(values: Tensor, node: fx.Node) -> Tensor:
    """Values as they broadcast to a node's own: those of batch norms and the like lie along axis 1."""
    rank = len(node.meta["val"].shape)
    along_channels = node.target in _NORMS or batchnorm.is_batch_norm(node)
    if along_channels and node.target is not aten.layer_norm.default:
        return values.view(1, -1, *[1] * (rank - 2))
    return values[(None,) * (rank - values.dim())]
