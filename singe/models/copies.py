"""Copies of models that hold on to what their last forward pass computed."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; tensors with a gradient history that modules keep as attributes are copied without it."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied
