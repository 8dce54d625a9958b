"""When two results count as equal."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .outputs import leaves

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_HALF_TOLERANCE = 3e-2


def alike(actual: Any, expected: Any) -> bool:
    """Whether all tensors of two nested outputs are :func:`close`."""
    a, e = leaves(actual), leaves(expected)
    return len(a) == len(e) and all(close(x, y) for x, y in zip(a, e, strict=True) if isinstance(y, Tensor))


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two tensors agree to the relative accuracy that their dtype allows after many layers."""
    if actual.shape != expected.shape:
        return False
    if expected.is_complex() and actual.is_complex():
        return close(torch.view_as_real(actual.resolve_conj()), torch.view_as_real(expected.resolve_conj()))
    if not expected.is_floating_point():
        return torch.equal(actual, expected)
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return False
    if not torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return False
    actual, expected = actual[finite], expected[finite]
    scale = expected.double().abs().max() if expected.numel() else 1.0
    return bool(((actual.double() - expected.double()).abs() <= tolerance * scale).all())


def distance(actual: Any, expected: Any) -> float:
    """The largest difference in a tensor of two nested outputs relative to its largest value; inf beyond rounding."""
    a, e = leaves(actual), leaves(expected)
    if len(a) != len(e):
        return math.inf
    return max((_distance(x, y) for x, y in zip(a, e, strict=True) if isinstance(y, Tensor)), default=0.0)


def _distance(actual: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point() or not torch.equal(actual.isfinite(), expected.isfinite()):
        return 0.0 if close(actual, expected) else math.inf
    finite = expected.isfinite()
    actual, expected = actual[finite].double(), expected[finite].double()
    if not expected.any():
        return math.inf if actual.any() else 0.0
    return float((actual - expected).abs().max() / expected.abs().max())
