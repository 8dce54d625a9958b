"""Models wrapped in another module: data parallel, compiled and averaged ones."""

from __future__ import annotations

import logging

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

log = logging.getLogger("singe")

PREFIXES = ("module.", "_orig_mod.")
"""With which the names of what is inside of a wrapper begin."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DataParallel, DistributedDataParallel, AveragedModel and torch.compile, in any order.

    It is the same module with the same parameters. A model without a wrapper is returned as it is.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"expected the torch.nn.Module that TorchScript was made from, got {type(model).__name__}")
    while (inner := _inside(model)) is not None:
        log.info("taking the module inside of %s", type(model).__name__)
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)):
        inner: nn.Module = model.module
        return inner
    # recognises what torch.compile returns without importing its class, which takes seconds
    return model._modules.get("_orig_mod")


def remark_on(name: str) -> str:
    """A remark for a message about an unknown module name, if the name begins as in a wrapped model; else nothing."""
    inner = name
    while inner.startswith(PREFIXES):
        inner = inner.partition(".")[2]
    return f" (of a wrapped model, the module inside is taken: perhaps {inner!r})" if inner != name else ""
