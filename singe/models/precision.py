"""The arithmetic in which networks run: torch's settings of TF32 and the like, and autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .. import values

Precision = Literal["float32", "tf32", "bfloat16"]


def check_precision(precision: Any, model: nn.Module, device: torch.device) -> None:
    """Raises ValueError for anything that is not a precision, or not one for this model on its device."""
    values.choice("precision", precision, get_args(Precision))
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"expected precision 'tf32' with a model on a CUDA device, got one on {device}")
    if precision == "bfloat16" and any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError("expected precision 'bfloat16' with a model in float32, got one in float16")


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Sets the arithmetic inside: the model's own dtype without or with TF32, or autocast to bfloat16.

    On CUDA, convolutions give the same bits each time.
    """
    with (
        _repeatable_convolutions(device),
        multiplication(device, tf32=precision == "tf32"),
        torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False),
    ):
        yield


@contextmanager
def _repeatable_convolutions(device: torch.device) -> Iterator[None]:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        if device.type == "cuda":
            cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


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

    def value(self) -> Any:
        """None where it contradicts another."""
        with suppress(RuntimeError):
            return self.read()
        return None


def _attribute(of: Any, name: str, exact: Any, tf32: Any) -> _Setting:
    return _Setting(partial(getattr, of, name), partial(setattr, of, name), exact, tf32)


_BACKENDS: Any = torch.backends

_OLDER = (
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "high"),
    _attribute(_BACKENDS.cudnn, "allow_tf32", False, True),
)
"""Writing one also writes newer ones; reading one fails where newer ones have been set to something else."""

_CUDA = tuple(
    _attribute(of, "fp32_precision", "ieee", "tf32")
    for of in (_BACKENDS.cuda.matmul, _BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn)
)
_CPU = tuple(
    _attribute(of, "fp32_precision", "ieee", "ieee")
    for of in (_BACKENDS.mkldnn.matmul, _BACKENDS.mkldnn.conv, _BACKENDS.mkldnn.rnn)
)

_Values = Sequence[tuple[_Setting, Any]]


def _now() -> _Values:
    return [(setting, setting.value()) for setting in (*_OLDER, *_CUDA, *_CPU)]


def _restore(values: _Values) -> None:
    """Writes what differs. A setting that can follow ``torch.backends.fp32_precision`` goes on following it."""
    older, newer = values[: len(_OLDER)], values[len(_OLDER) :]

    def write_newer() -> None:
        for setting, value in newer:
            for attempt in ("none", value):
                if setting.value() != value:
                    setting.write(attempt)

    for setting, value in older:
        if value is not None and setting.value() != value:
            setting.write(value)
    write_newer()
    for setting, value in older:
        for attempt in (setting.tf32, setting.exact) if value is None else ():
            if setting.value() is not None:  # it contradicted the newer ones, and will again
                setting.write(attempt)
                write_newer()


def _write(tf32: bool, device: torch.device) -> None:
    on_cuda = device.type == "cuda"
    for setting in _OLDER:
        if on_cuda or setting.value() is None:  # torch.export cannot stand contradictions
            setting.write(setting.tf32 if tf32 else setting.exact)
    for setting in _CUDA if on_cuda else _CPU:
        if not _suits(setting, tf32):
            setting.write(setting.tf32 if tf32 else setting.exact)


def _suits(setting: _Setting, tf32: bool) -> bool:
    """Whether a newer setting is as wanted: with "none", and nothing to follow, there is no TF32 either."""
    return setting.read() in ((setting.tf32,) if tf32 else (setting.exact, "none"))


@contextmanager
def multiplication(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Multiplies float32 values in TF32 on CUDA, or in full precision; restores the settings of before."""
    if all(_suits(setting, tf32) for setting in (_CUDA if device.type == "cuda" else _CPU)):
        yield
        return
    before = _now()
    try:
        _write(tf32, device)
        yield
    finally:
        _restore(before)


class _Callers:
    """What the caller of the outermost call had set; calls may overlap in several threads."""

    lock = threading.Lock()
    calls = 0
    values: _Values = ()


@contextmanager
def exact_multiplication(device: torch.device) -> Iterator[None]:
    """Multiplies float32 values in full precision, whatever the caller has set: results are compared to 1e-4."""
    with _Callers.lock:
        if not _Callers.calls:
            _Callers.values = _now()
        _Callers.calls += 1
    before = _now()
    try:
        _write(False, device)
        yield
    finally:
        with _Callers.lock:
            _Callers.calls -= 1
            _restore(before if _Callers.calls else _Callers.values)


@contextmanager
def callers_multiplication() -> Iterator[None]:
    """Multiplies as the caller has set, inside :func:`exact_multiplication`."""
    before = _now()
    if not _Callers.calls or before == _Callers.values:
        yield
        return
    try:
        _restore(_Callers.values)
        yield
    finally:
        _restore(before)


def wide(value: Tensor) -> Tensor:
    """The same value, in float32 if it is of a half type, in which small differences and sums would be lost."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def prefers_channels_last(precision: Precision, device: torch.device) -> bool:
    """Whether convolutions are fastest with the channels innermost: on CPUs, and on the tensor cores of GPUs."""
    return device.type == "cpu" or precision != "float32"


def formatted(value: Tensor, channels_last: bool) -> Tensor:
    """Images, or kernels, with their channels innermost if asked for; anything else as it is."""
    return value.contiguous(memory_format=torch.channels_last) if channels_last and value.dim() == 4 else value
