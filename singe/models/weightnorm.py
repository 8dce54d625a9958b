"""Weight norms taken off while a network is worked on, and put back: a neuron's row is then one plain tensor's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm as HookedWeightNorm

from .copies import copy_of


@dataclass(frozen=True)
class WeightNorm:
    """One weight norm of a model.

    Attributes:
        module: name of the module.
        name: of the parameter.
        dim: the axis whose slices each have a length; -1 for a single length.
        hooked: whether it is the older kind, a hook, or a parametrization.
        requires_grad: of the length and the direction.
    """

    module: str
    name: str
    dim: int
    hooked: bool
    requires_grad: tuple[bool, bool]


def weight_norms(model: nn.Module) -> list[WeightNorm]:
    """The weight norms of a model; those of modules with other parametrizations do not count."""
    return [norm for name, module in model.named_modules() for norm in _norms(name, module)]


def _norms(name: str, module: nn.Module) -> list[WeightNorm]:
    found = []
    applied_to: Any = module
    lists = applied_to.parametrizations.items() if parametrize.is_parametrized(module) else ()
    if all(len(applied) == 1 and type(applied[0]) is _WeightNorm for _, applied in lists):
        for parameter, applied in lists:
            trained = applied.original0.requires_grad, applied.original1.requires_grad
            found.append(WeightNorm(name, parameter, applied[0].dim, False, trained))
    for hook in module._forward_pre_hooks.values():
        if type(hook) is HookedWeightNorm:
            parts = getattr(module, f"{hook.name}_g"), getattr(module, f"{hook.name}_v")
            found.append(WeightNorm(name, hook.name, hook.dim, True, tuple(p.requires_grad for p in parts)))
    return found


def without_weight_norms(model: nn.Module) -> nn.Module:
    """Makes every weight-normed parameter of a model a plain one, in place; returns the model."""
    norms = weight_norms(model)
    with torch.no_grad():
        weights = [_value(model.get_submodule(norm.module), norm) for norm in norms]
    for norm, weight in zip(norms, weights, strict=True):
        module: Any = model.get_submodule(norm.module)
        if norm.hooked:
            nn.utils.remove_weight_norm(module, norm.name)
        elif parametrize.is_parametrized(module):
            # torch's own removal would change the class, which copies of a module share
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
        setattr(module, norm.name, nn.Parameter(weight, any(norm.requires_grad)))
    return model


def with_weight_norms(model: nn.Module, norms: list[WeightNorm]) -> nn.Module:
    """Puts weight norms back, in place; the weights do not change."""
    for norm in norms:
        module: Any = model.get_submodule(norm.module)
        if norm.hooked:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                hooked_weight_norm(module, norm.name, norm.dim)
            parts = [getattr(module, f"{norm.name}_{part}") for part in "gv"]
        else:
            # the hook that reads older state dicts is still there, so only the parametrization itself
            parametrize.register_parametrization(module, norm.name, _WeightNorm(norm.dim), unsafe=True)
            parts = [getattr(module.parametrizations[norm.name], f"original{i}") for i in range(2)]
        length, direction = parts
        with torch.no_grad():  # a row of zeros has no direction
            direction.masked_fill_((length == 0).expand_as(direction), 1)
        for part, trained in zip(parts, norm.requires_grad, strict=True):
            part.requires_grad_(trained)
    return model


def _value(module: Any, norm: WeightNorm) -> Tensor:
    if not norm.hooked:
        value: Tensor = getattr(module, norm.name).clone()
        return value
    direction, length = getattr(module, f"{norm.name}_v"), getattr(module, f"{norm.name}_g")
    return torch._weight_norm(direction, length, norm.dim).clone()


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy without weight norms."""
    return without_weight_norms(copy_of(model))
