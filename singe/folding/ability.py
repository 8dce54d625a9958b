"""Which layers can absorb a scale and a shift, and which batch norms can be removed, each judged by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..graph.batchnorm import is_batch_norm
from ..graph.groups import module_of
from ..graph.nodes import described, place_of
from ..graph.trace import Trace
from .flow import absorbs


def unable(model: nn.Module, graph: Trace) -> dict[fx.Node, str]:
    """The calls of layers whose weights must stay as they are -> what to call them in a reason."""
    holders = Counter(id(t) for module in model.modules() for t in module._parameters.values())
    found = {node: _inability(model, graph, node, holders) for node in graph.nodes if absorbs(node)}
    return {node: what for node, what in found.items() if what is not None}


def _inability(model: nn.Module, graph: Trace, node: fx.Node, holders: Counter[int]) -> str | None:
    weight, bias = (graph.parameter(node, i, name) for i, name in ((1, "weight"), (2, "bias")))
    if is_batch_norm(node) and None in (weight, bias):
        return f"{described(node)}, which has no weight and bias of its own"
    if weight is None:
        return f"{described(node)}, whose weight is computed"
    name = module_of(weight)
    module: Any = model.get_submodule(name)
    if not isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)):
        return f"{weight}, which belongs to no convolution, linear layer or batch norm"
    if any(holders[id(t)] > 1 for t in (module.weight, module.bias) if t is not None):
        return f"{name}, whose weight or bias is tied to another's"
    if bias != (None if module.bias is None else f"{name}.bias"):
        return f"{name}, whose bias is computed"
    if (count := len(graph.calls(weight))) > 1:
        return f"{name}, which is used {count} times"
    return f"{name}, which has forward hooks" if _hooked(module) else None


def why_it_stays(model: nn.Module, graph: Trace, calls: Sequence[fx.Node], norm: Any) -> str | None:
    """Why a batch norm cannot be removed, whatever surrounds its calls; None where it can."""
    if _hooked(norm):
        return "has forward hooks"
    if norm.running_mean is None:
        return "has no statistics of its own"
    if not calls:
        return "is not called in eval mode"
    own = type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if own and not all(_only_wraps(model, graph, call, norm) for call in calls):
        return f"is a {type(norm).__name__}, which has a forward of its own"
    if any(a is not None and a not in graph.state for call in calls for a in call.args[1:5]):
        return "has a computed weight or bias"
    return None


def _only_wraps(model: nn.Module, graph: Trace, call: fx.Node, norm: nn.Module) -> bool:
    """Whether a batch norm's own forward only normalises and calls its children in their order."""
    place, children = place_of(call), [name for name, _ in norm.named_children()]
    if model.get_submodule(place) is not norm:
        return False
    latest = -1
    for node in graph.nodes:
        if is_batch_norm(node) and place_of(node) == place:
            latest = -1
        elif place_of(node) == place and not graph.is_size(node):
            return False
        elif place_of(node).startswith(f"{place}."):
            child = children.index(place_of(node).removeprefix(f"{place}.").partition(".")[0])
            if child < latest:
                return False
            latest = child
    return True


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
