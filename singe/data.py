"""An endless, restartable stream of batches over the user's loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import checks
from .isolation import seed_everything
from .losses import Batch

_END = object()


class Stream:
    """Draws (x, y) batches from a loader again and again; restarting with a seed makes what follows repeatable.

    Args:
        loader: any iterable of (x, y) batches that can be iterated anew, such as a ``DataLoader``.
        device: where batches go.

    Raises:
        TypeError: not an iterable, or one that can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"expected an iterable of (x, y) batches, got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            raise TypeError(f"expected a loader that can be iterated again, got a one-shot {type(loader).__name__}")
        self._loader, self._device = loader, device
        self._batches: Iterator[Any] | None = None

    def restart(self, seed: int) -> None:
        """Begins a new epoch with every random generator seeded."""
        self._batches = None
        seed_everything(seed, self._loader)

    def next(self) -> Batch:
        """The next batch; a new epoch begins where one ends.

        Raises:
            ValueError: the loader is empty, or the batch holds NaN.
            TypeError: the batch is not a pair of tensors.
        """
        if self._batches is None:
            self._batches = iter(self._loader)
        item = next(self._batches, _END)
        if item is _END:
            self._batches = iter(self._loader)
            item = next(self._batches, _END)
            if item is _END:
                raise ValueError("expected a loader with at least one batch, got an empty one")
        return checks.batch_of(item, self._device)

    def take(self, images: int) -> Batch:
        """One batch of exactly ``images`` samples, joined from as many batches as that needs.

        Raises:
            ValueError: batches differ in more than their length.
        """
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        count = 0
        while count < images:
            x, y = self.next()
            if xs and (x.shape[1:] != xs[0].shape[1:] or y.shape[1:] != ys[0].shape[1:]):
                raise ValueError(
                    f"expected batches of one shape, got x {tuple(xs[0].shape)} and {tuple(x.shape)}, "
                    f"y {tuple(ys[0].shape)} and {tuple(y.shape)}"
                )
            xs.append(x)
            ys.append(y)
            count += len(x)
        return torch.cat(xs)[:images], torch.cat(ys)[:images]
