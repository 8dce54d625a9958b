"""Copies of models that hold on to what their last forward pass computed."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy; tensors with a gradient history that modules keep as attributes are copied without it.

    Raises:
        ValueError: a module's own ``__deepcopy__`` shares parameters or buffers with it.
    """
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo = {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf}
    copied: nn.Module = copy.deepcopy(model, memo)
    own = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    shared = [own[id(t)] for t in (*copied.parameters(), *copied.buffers()) if id(t) in own]
    if shared:
        raise ValueError(f"the copy shares {', '.join(shared[:3])}{', ...' if shared[3:] else ''} with it")
    return copied
