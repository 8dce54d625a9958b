"""What is added to a group's neurons on their way and fades with them: shifts of norms, parameters of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from . import batchnorm
from .groups import Group, Slice
from .operators import aten
from .stored import Stored
from .trace import Env, Trace, evaluate

# which argument is the shift
_NORMS = {aten.instance_norm.default: 2, aten.group_norm.default: 3, aten.layer_norm.default: 3}


@dataclass(frozen=True, eq=False)
class Rider:
    """An operator that adds something to every neuron that passes through it.

    Attributes:
        node: the operator.
        tensor: qualified name of a parameter or buffer that identifies the neurons.
        neuron: int64, broadcast to the operator's value: the group's neuron each element belongs to, -1 for none.
        addend: the node of the value added; None for a batch norm, which adds beta - a mean.
        sign: the factor of that value.
    """

    node: fx.Node
    tensor: str
    neuron: Tensor
    addend: fx.Node | None
    sign: float

    def shift(self, live: Env) -> Tensor:
        """What is added; broadcast like ``neuron``."""
        if self.addend is None:
            return _placed(batchnorm.affine(self.node, live).shift, self.node)
        return _placed(_moved(self.addend, live), self.node) * self.sign


def find_riders(trace: Trace, group: Group, nodes: Iterable[fx.Node]) -> Iterator[Rider]:
    """The operators among ``nodes`` that add parameters owned by the group to its neurons."""
    stored = Stored(trace)
    owned = {s.tensor: s for s in group.slices if s.role == "writes"}
    for node in nodes:
        if batchnorm.is_plain(node):
            tensor = batchnorm.owned_tensor(trace, node)
            if tensor in owned:
                yield Rider(node, tensor, _placed(owned[tensor].neuron, node), None, 1)
            continue
        addend, sign = _addition(node, stored)
        sources = stored.sources(addend) if addend is not None else []
        if addend is not None and sources and trace.state[sources[0]] in owned:
            mine = owned[trace.state[sources[0]]]
            owners = _moved(addend, {**trace.integers, sources[0]: _spread(mine, sources[0])})
            yield Rider(node, mine.tensor, _placed(owners, node), addend, sign)


def _addition(node: fx.Node, stored: Stored) -> tuple[fx.Node | None, float]:
    """The elements of a stored tensor that an operator adds to another value, and their factor."""
    arguments: tuple[Any, ...] = node.args
    if node.target in _NORMS:
        place = _NORMS[node.target]
        return (arguments[place] if len(arguments) > place else None), 1
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or len(node.all_input_nodes) != 2:
        return None, 1
    alpha: Any = node.kwargs.get("alpha", 1)
    signs = (1, alpha if node.target is aten.add.Tensor else -alpha)
    for addend, other, sign in zip(arguments, arguments[::-1], signs, strict=True):
        if stored.holds(addend) and stored.is_moved(addend) and not stored.holds(other):
            return addend, sign
    return None, 1


def _moved(node: fx.Node, values: Env) -> Tensor:
    """A stored tensor as it arrives at ``node``."""
    if node in values:
        value: Tensor = values[node]
        return value
    args = fx.map_arg(node.args, lambda i: _moved(i, values))
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
