"""The arithmetic in which networks run: torch's settings of TF32 and the like, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

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
        multiplication(tf32=precision == "tf32"),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False),
    ):
        yield


class _Setting(NamedTuple):
    """One of torch's settings of how values in float32 are multiplied.

    Attributes:
        read: returns its value; RuntimeError where it contradicts another.
        write: sets it.
        exact: its value for full precision.
        tf32: its value for TF32 on CUDA.
    """

    read: Callable[[], Any]
    write: Callable[[Any], None]
    exact: Any
    tf32: Any


def _settings() -> list[_Setting]:
    """All of them; torch's older ones first, since they set the newer ones, too."""
    backends: Any = torch.backends

    def attribute(of: Any, name: str, exact: Any, tf32: Any) -> _Setting:
        return _Setting(partial(getattr, of, name), partial(setattr, of, name), exact, tf32)

    cuda, cpu = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn), backends.mkldnn
    return [
        _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"),
        attribute(backends.cudnn, "allow_tf32", False, True),
        *(attribute(of, "fp32_precision", "ieee", "tf32") for of in cuda),
        *(attribute(of, "fp32_precision", "ieee", "ieee") for of in (cpu.matmul, cpu.conv, cpu.rnn)),
    ]


_Values = Sequence[tuple[_Setting, Any]]

_CALLERS: ContextVar[_Values | None] = ContextVar("callers_multiplication", default=None)
"""What the caller has set; None outside of :func:`exact_multiplication`."""


def _now() -> _Values:
    """All settings that can be read: where older and newer ones contradict each other, torch refuses to read them."""
    return [(setting, value) for setting in _settings() if (value := _read(setting)) is not None]


def _read(setting: _Setting) -> Any:
    with suppress(RuntimeError):
        return setting.read()
    return None


@contextmanager
def _set_to(values: _Values) -> Iterator[None]:
    """Changes what differs, and nothing else: what is written no longer follows ``torch.backends.fp32_precision``."""
    before = _now()
    try:
        for setting, value in values:
            if _read(setting) not in (value, "none" if value == "ieee" else value):
                setting.write(value)
        yield
    finally:
        for setting, value in before:
            if _read(setting) != value:
                setting.write(value)


@contextmanager
def multiplication(*, tf32: bool) -> Iterator[None]:
    """Multiplies float32 values in TF32 on CUDA, or in full precision; restores the settings of before."""
    with _set_to([(setting, setting.tf32 if tf32 else setting.exact) for setting, _ in _now()]):
        yield


@contextmanager
def exact_multiplication() -> Iterator[None]:
    """Multiplies float32 values in full precision, whatever the caller has set: results are compared to 1e-4."""
    token = _CALLERS.set(_now())
    try:
        with multiplication(tf32=False):
            yield
    finally:
        _CALLERS.reset(token)


@contextmanager
def callers_multiplication() -> Iterator[None]:
    """Multiplies as the caller has set, inside :func:`exact_multiplication`."""
    with _set_to(_CALLERS.get() or ()):
        yield


def wide(value: Tensor) -> Tensor:
    """The same value, in float32 if it is of a half type, in which small differences and sums would be lost."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def prefers_channels_last(precision: Precision, device: torch.device) -> bool:
    """Whether convolutions are fastest with the channels innermost: on CPUs, and on the tensor cores of GPUs."""
    return device.type == "cpu" or precision != "float32"
