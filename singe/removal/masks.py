"""Masks of single weights as ``torch.nn.utils.prune`` keeps them: NAME_orig, NAME_mask and a hook that multiplies.

Names are those of the parameters without masks, the first under which the model lists each; a tied one is masked
wherever it occurs. A mask is bool, of the parameter's shape, True where a weight stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from ..graph.groups import module_of
from ..graph.trace import Forward, answer, plain_call
from ..models.copies import copy_of
from ..models.numerics import alike

Masks = Mapping[str, Tensor]


@torch.no_grad()
def zero_out(parameter: Tensor, kept: Tensor, optimizer: Optimizer | None = None) -> None:
    """Zeroes a parameter where a mask says so, and the optimiser's state for these weights."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for tensor in (parameter, *state.values()):
        if isinstance(tensor, Tensor) and tensor.shape == kept.shape:
            tensor.masked_fill_(~kept, 0)


@torch.no_grad()  # so that the products are in no autograd graph, and the model can be copied
def put_on(model: nn.Module, masks: Masks) -> nn.Module:
    """Masks parameters of a model in place; returns the model."""
    for name, kept in masks.items():
        for module, own in _holders(model, name):
            prune.custom_from_mask(module, own, kept)
    return model


def take_off(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Makes masked parameters plain ones that hold the zeros, in place; returns the model."""
    for name in names:
        for module, own in _holders(model, f"{name}_orig"):
            prune.remove(module, own.removesuffix("_orig"))
    return model


def are_on(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether masks are on some of these parameters."""
    listed = dict(model.named_parameters(remove_duplicate=False))
    return any(f"{name}_orig" in listed for name in names)


def unmaskable(model: nn.Module, names: Sequence[str], inputs: Any, forward: Forward = plain_call) -> dict[str, str]:
    """Parameters whose masks would not be applied -> why.

    The hook that multiplies runs when the module that holds the parameter is called. Code that reads the parameter of
    another module without calling it, as ``torch.nn.MultiheadAttention`` does, would see an old product.

    Args:
        model: in eval mode; not modified.
        names: of parameters.
        inputs: a few samples.
        forward: how the model is called.
    """
    trial = copy_of(model)
    put_on(trial, {name: torch.ones_like(model.get_parameter(name), dtype=torch.bool) for name in names})
    with torch.no_grad():
        expected = answer(trial, inputs, forward)

    @torch.no_grad()
    def is_stale(some: Iterable[str]) -> bool:
        """Whether products that are not recomputed reach the outputs."""
        places = [place for name in some for place in _holders(trial, f"{name}_orig")]
        before = [(module, own.removesuffix("_orig"), getattr(module, own)) for module, own in places]
        for module, own, parameter in before:
            setattr(module, own, torch.full_like(parameter, torch.nan))
        outputs = answer(trial, inputs, forward)
        for module, own, parameter in before:
            setattr(module, own, parameter.detach().clone())
        return not alike(outputs, expected)

    if not is_stale(names):
        return {}
    reason = "it is read where {} is not called, so that torch.nn.utils.prune could not mask it"
    return {name: reason.format(module_of(name) or "the model") for name in names if is_stale([name])}


def _holders(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every module that holds a parameter, with the module's own name for it."""
    parameter = model.get_parameter(name)
    return [(m, own) for m in model.modules() for own, p in m._parameters.items() if p is parameter]
