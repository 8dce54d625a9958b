"""Bad input refused before work starts: every check says what was expected and what came."""

from __future__ import annotations

import copy
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .graph.trace import forward
from .losses import Batch
from .numerics import close


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters.

    Raises:
        TypeError: not a module.
        ValueError: no parameters, or parameters on several devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"expected a model whose parameters are on one device, got {found}")
    return devices.pop()


def finite_weights(model: nn.Module) -> None:
    """Raises ValueError, naming the tensor, if a parameter holds NaN or infinity, or a buffer NaN."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"expected finite weights, got NaN or infinity in {name}")
    for name, tensor in model.named_buffers():
        if tensor.isnan().any():  # infinity is what masks are made of
            raise ValueError(f"expected buffers without NaN, got NaN in {name}")


def batch_of(item: Any, device: torch.device) -> Batch:
    """An (x, y) pair on ``device``.

    Raises:
        TypeError: not a pair of tensors.
        ValueError: empty, of different lengths, or x holds NaN or infinity.
    """
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(f"expected a batch (x, y), got {_describe(item)}")
    x, y = item
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise TypeError(f"expected a batch (x, y) of tensors, got {_describe(item)}")
    if x.dim() == 0 or y.dim() == 0 or len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"expected x and y of one length, at least 1, got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.is_floating_point() and not x.isfinite().all():
        raise ValueError("expected finite inputs, got NaN or infinity in x")
    return _plain(x).to(device, non_blocking=True), _plain(y).to(device, non_blocking=True)


def _plain(t: Tensor) -> Tensor:
    """The tensor without gradient history, usable by autograd."""
    if t.is_inference():
        return t.clone()
    return t.detach() if t.requires_grad else t


def integer(name: str, value: Any, least: int) -> int:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected an int for {name}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}")
    return value


def number(name: str, value: Any) -> float:
    """Raises TypeError unless ``value`` is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected a number for {name}, got {type(value).__name__}")
    return float(value)


def copied(model: nn.Module) -> nn.Module:
    """A copy in eval mode, to work on.

    Raises:
        ValueError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(
            f"expected a model that copy.deepcopy can copy, but {type(model).__name__} holds what it cannot (such as a "
            f"tensor kept from a forward pass, a lock, or torch.nn.utils.prune masks): {error}"
        ) from error


def runs(model: nn.Module, x: Tensor) -> None:
    """Raises ValueError if ``model(x)`` fails or does not give the same twice."""
    try:
        with torch.no_grad():
            twice = [pytree.tree_leaves(forward(model, x)) for _ in range(2)]
    except Exception as error:
        raise ValueError(
            f"expected batches that fit {type(model).__name__}, but model(x) failed for x of shape "
            f"{tuple(x.shape)}, {x.dtype}: {error}"
        ) from error
    if not all(close(a, b) for a, b in zip(*twice, strict=True) if isinstance(a, Tensor)):
        raise ValueError(f"expected {type(model).__name__} to answer alike in eval mode, got two different answers")


def _describe(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} of ({', '.join(type(v).__name__ for v in item)})"
    return type(item).__name__
