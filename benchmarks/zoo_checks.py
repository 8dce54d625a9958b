"""The checks of a pruned model of the zoo, whatever pruned it."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from singe.graph.export import first_line

Inputs = Sequence[Tensor]


def described(error: BaseException) -> str:
    """The type and the first line of an error, without this machine's folders; "memory limit" if memory ran out."""
    line = re.sub(r"(?<!\w)/(?:[\w.+-]+/)+", "", first_line(error))
    if isinstance(error, MemoryError) or "can't allocate memory" in line or "bad_alloc" in line:
        return "memory limit"
    return f"{type(error).__name__}: {line}"


def squares(outputs: Any, _: Any = None) -> Tensor:
    """The mean square of each of the outputs, summed: a loss that depends on all of them."""
    return torch.stack([leaf.square().mean() for leaf in pytree.tree_leaves(outputs)]).sum()


def learning(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters that get a gradient in a forward and backward pass in train mode; on a copy."""
    model = copy.deepcopy(model).requires_grad_().train()
    squares(model(*inputs)).backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.isfinite().all()}


def shared(model: nn.Module) -> set[tuple[str, ...]]:
    """The names of each parameter with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {tuple(own) for own in names.values() if len(own) > 1}


def training_problem(model: nn.Module, inputs: Inputs, original: nn.Module) -> str | None:
    """Why a model does not train as the original does: an error, a parameter without gradient or no longer shared."""
    try:
        missing = sorted(learning(original, inputs) - learning(model, inputs))
    except Exception as error:  # whatever a broken model raises
        return described(error)
    if missing:
        return f"no gradient for {', '.join(missing)}"
    parted = shared(original) - shared(model)
    return f"no longer shared: {', '.join(min(parted))}" if parted else None


@torch.no_grad()
def shapes(model: nn.Module, inputs: Inputs) -> list[tuple[int, ...]]:
    """Of all outputs."""
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(model(*inputs))]


@torch.no_grad()
def largest_difference(model: nn.Module, reference: nn.Module, inputs: Inputs) -> float:
    """The largest difference between outputs of two models, relative to the largest number in each reference output."""
    pairs = zip(*(pytree.tree_leaves(network(*inputs)) for network in (model, reference)), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
