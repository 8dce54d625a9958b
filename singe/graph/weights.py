"""The weights of a network: the parameters by which its convolutions and linear layers multiply their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from .groups import module_of
from .layer import is_layer
from .nodes import argument, described
from .stored import Stored
from .trace import Trace


@dataclass(frozen=True)
class Weight:
    """One weight tensor.

    Attributes:
        name: the qualified name under which the model lists it first.
        size: how many single weights it holds.
        members: names of all modules that hold it.
    """

    name: str
    size: int
    members: tuple[str, ...]

    @property
    def writers(self) -> tuple[str, ...]:
        """Itself: what decides its place in the network, as a group's writers do."""
        return (self.name,)


@dataclass(frozen=True)
class Weights:
    """All weights of a network, tied ones once.

    Attributes:
        prunable: those that some operator takes as they are, in execution order.
        other: names of the other weights -> why they cannot be pruned.
        total: how many single weights all of them hold; for a computed tensor, as many as the operator takes.
    """

    prunable: list[Weight]
    other: dict[str, str]
    total: int


def find_weights(trace: Trace, model: nn.Module) -> Weights:
    """The weights of a model.

    A parameter that is moved or cut on its way to the operator, as the stacked projections of an attention are, counts
    as taken as it is.

    Args:
        trace: of the model in eval mode.
        model: not modified.
    """
    stored, parameters = Stored(trace), dict(model.named_parameters())
    plain: dict[str, None] = {}
    computed: dict[str, tuple[str, int]] = {}
    for call in (node for node in trace.nodes if is_layer(node)):
        operand: Any = argument(call, 1, "weight", None)
        sources = [name for name in _sources(trace, stored, operand) if name in parameters]
        if sources and stored.is_computed(operand):
            largest = max(sources, key=lambda name: parameters[name].numel())
            computed[largest] = f"the weight of {described(call)} is computed", operand.meta["val"].numel()
        elif sources:
            plain[sources[0]] = None
    other = {name: found for name, found in computed.items() if name not in plain}
    for name in _modules_weights(model):
        if name not in plain and name not in other:
            other[name] = "no convolution or linear layer reads it in eval mode", parameters[name].numel()
    found = [Weight(name, parameters[name].numel(), _holders(model, name)) for name in plain]
    total = sum(w.size for w in found) + sum(size for _, size in other.values())
    return Weights(found, {name: reason for name, (reason, _) in other.items()}, total)


def _sources(trace: Trace, stored: Stored, operand: fx.Node) -> list[str]:
    return [trace.state[source] for source in stored.sources(operand)]


def _modules_weights(model: nn.Module) -> list[str]:
    """First names of the weights that torch's convolutions and linear layers hold as parameters."""
    first = {id(p): name for name, p in model.named_parameters()}
    held = [m._parameters.get("weight") for m in model.modules() if isinstance(m, (_ConvNd, nn.Linear))]
    return [first[id(weight)] for weight in held if weight is not None]


def _holders(model: nn.Module, name: str) -> tuple[str, ...]:
    parameter = model.get_parameter(name)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter]
    return tuple(dict.fromkeys(map(module_of, names)))
