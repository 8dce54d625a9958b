"""What tells functions and objects from others, the same in every process."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .digest import digest


def of_object(value: object) -> str:
    """Its repr, without addresses in memory and the order of sets; of tensors and arrays of numbers all values."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}({sorted(map(of_object, value))})"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({[*map(of_object, value)]})"
    if isinstance(value, dict):
        return f"dict({sorted((of_object(key), of_object(own)) for key, own in value.items())})"
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        return f"tensor {digest('', {'': torch.as_tensor(value)})[:8]}"
    if isinstance(value, FunctionType):
        return of_function(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def of_function(function: Callable[..., Any]) -> str:
    """Its name; of a lambda also its code, and of a partial what it has been given.

    What a function has captured, or a callable object holds, is not looked at.
    """
    if isinstance(function, partial):
        given = [*map(of_object, function.args), *(f"{k}={of_object(v)}" for k, v in sorted(function.keywords.items()))]
        return f"{of_function(function.func)}({', '.join(given)})"
    name: str = getattr(function, "__qualname__", type(function).__name__)
    code = getattr(function, "__code__", None)
    if code is None or code.co_name != "<lambda>":
        return name
    defaults = of_object([getattr(function, which, None) for which in ("__defaults__", "__kwdefaults__")])
    return f"{name} {sha256((_of_code(code) + defaults).encode()).hexdigest()[:8]}"


def _of_code(code: CodeType) -> str:
    """What code does, without where it is written."""
    constants = [_of_code(value) if isinstance(value, CodeType) else of_object(value) for value in code.co_consts]
    return repr((code.co_code, code.co_names, code.co_freevars, constants))
