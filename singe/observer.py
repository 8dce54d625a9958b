"""Observers of a run: the user's own measure of the network, and callbacks; neither affects the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .models.copies import copy_of
from .models.isolation import callers_settings, preserved_random_state
from .records import Record

Evaluate = Callable[[nn.Module], float]
"""A network in eval mode -> how good it is, the higher the better."""

Callback = Callable[[Any], object]
"""Takes a record."""


class Observer:
    """Calls ``evaluate`` and ``callbacks`` as :func:`singe.prune` says, with all random states preserved.

    Args:
        evaluate: see :func:`singe.prune`; None for none.
        callbacks: likewise.
        loader: whose generators are preserved, too.
        tells: whether callbacks are called.

    Raises:
        TypeError: not functions.
    """

    def __init__(
        self,
        evaluate: Evaluate | None = None,
        callbacks: Iterable[Callback] = (),
        loader: Any = None,
        *,
        tells: bool = True,
    ) -> None:
        if evaluate is not None and not callable(evaluate):
            raise TypeError(f"expected evaluate to be a function of a model, got {type(evaluate).__name__}")
        if callable(callbacks) or not isinstance(callbacks, Iterable):
            raise TypeError(f"expected a list of functions for callbacks, got {type(callbacks).__name__}")
        self._evaluate, self._callbacks, self._loader, self._tells = evaluate, tuple(callbacks), loader, tells
        for callback in self._callbacks:
            if not callable(callback):
                raise TypeError(f"expected callbacks to be functions of a record, got {type(callback).__name__}")

    def evaluation(self, model: nn.Module) -> float | None:
        """What ``evaluate`` returns for a copy of the model in eval mode; None without it.

        Raises:
            TypeError: it returns something other than a number.
            ValueError: it returns a number that is not finite.
        """
        if self._evaluate is None:
            return None
        with self._apart(), torch.no_grad():
            value: Any = self._evaluate(copy_of(model).eval())
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"expected evaluate(model) to return a number, got {type(value).__name__}")
        if not math.isfinite(value):
            raise ValueError(f"expected evaluate(model) to return a finite number, got {float(value)}")
        return float(value)

    def tell(self, record: Record) -> None:
        """Hands a record to every callback."""
        if not self._tells:
            return
        with self._apart():
            for callback in self._callbacks:
                callback(record)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        with preserved_random_state(self._loader), callers_settings():
            yield
