"""An endless, restartable stream of batches over the user's loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from . import checks
from .batches import Batch, head, joined, length
from .isolation import callers_device, seed_everything
from .task import Task

_END = object()


class Stream:
    """Draws batches from a loader again and again; restarting with a seed makes what follows repeatable.

    Args:
        loader: any iterable of batches that can be iterated anew, such as a ``DataLoader``.
        device: where batches go.
        task: what batches must be: pairs (x, y), or nested tensors where it has a ``forward`` of its own.

    Raises:
        TypeError: not an iterable, or one that can be iterated only once.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, task: Task = Task()) -> None:  # noqa: B008 - frozen
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"expected an iterable of batches, got {type(loader).__name__}")
        if isinstance(loader, Iterator):
            raise TypeError(f"expected a loader that can be iterated again, got a one-shot {type(loader).__name__}")
        self._loader, self._device, self._task = loader, device, task
        self._batches: Iterator[Any] | None = None

    def restart(self, seed: int) -> None:
        """Begins a new epoch with every random generator seeded."""
        self._batches = None
        seed_everything(seed, self._loader)

    def next(self) -> Batch:
        """The next batch; a new epoch begins where one ends.

        Raises:
            ValueError: the loader is empty, or the batch holds NaN.
            TypeError: the batch is not what the task takes.
        """
        with callers_device():
            item = _END if self._batches is None else next(self._batches, _END)
            if item is _END:
                self._batches = iter(self._loader)
                item = next(self._batches, _END)
        if item is _END:
            raise ValueError("expected a loader with at least one batch, got an empty one")
        return checks.batch_of(item, self._device, self._task)

    def take(self, images: int) -> Batch:
        """One batch of exactly ``images`` samples, joined from as many batches as that needs.

        Raises:
            ValueError: batches differ in more than their length.
        """
        batches = [self.next()]
        while sum(map(length, batches)) < images:
            batches.append(self.next())
        return head(joined(batches), images)
