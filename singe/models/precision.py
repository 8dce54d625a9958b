"""The arithmetic in which scores and training steps are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

Precision = Literal["float32", "tf32", "bfloat16"]


def check_name(precision: Any) -> None:
    """Raises ValueError for anything that is not a precision."""
    if precision not in get_args(Precision):
        raise ValueError(f"expected precision {', '.join(map(repr, get_args(Precision)))}, got {precision!r}")


def check_precision(precision: Any, model: nn.Module, device: torch.device) -> None:
    """Raises ValueError for anything that is not a precision, or not one for this model on its device."""
    check_name(precision)
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"expected precision 'tf32' with a model on a CUDA device, got one on {device}")
    if precision == "bfloat16" and any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError("expected precision 'bfloat16' with a model in float32, got one in float16")


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Sets the arithmetic inside: the model's own dtype without or with TF32, or autocast to bfloat16."""
    with (
        _tf32(precision == "tf32", device),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False),
    ):
        yield


@contextmanager
def _tf32(allowed: bool, device: torch.device) -> Iterator[None]:
    """Allows or forbids TF32 inside; restores the caller's setting."""
    backends: Any = torch.backends
    switches = [backends.cuda.matmul, backends.cudnn.conv] if device.type == "cuda" else []
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def wide(value: Tensor) -> Tensor:
    """The same value, in float32 if it is of a half type, in which small differences and sums would be lost."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def prefers_channels_last(precision: Precision, device: torch.device) -> bool:
    """Whether convolutions are fastest with the channels innermost: on CPUs, and on the tensor cores of GPUs."""
    return device.type == "cpu" or precision != "float32"
