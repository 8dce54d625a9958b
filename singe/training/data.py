"""An endless, restartable stream of batches over the user's loader."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import checks
from ..models.batches import Batch, described, head, joined, length, tensors
from ..models.isolation import callers_device, counting_epochs, seed_everything
from ..ranks import ALONE, Ranks
from ..task import Task

log = logging.getLogger("singe")

_END, _NONE = object(), object()
_MANY = 8
"""Epochs that it takes a small loader to yield some samples; more are told."""


class Stream:
    """Draws batches from a loader repeatedly; restarting with a seed makes later batches repeatable.

    Args:
        loader: any iterable of batches that can be iterated again, such as a ``DataLoader``.
        device: where batches go.
        task: decides what batches must be: pairs (x, y), or nested tensors if it has a ``forward``.
        ranks: that draw at the same time, each from its own loader, which may hold all samples or a share of them.

    Attributes:
        batch_length: how many samples the first batch had; 0 before that.

    Raises:
        TypeError: not an iterable, or one that can be iterated only once.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        device: torch.device,
        task: Task = Task(),  # noqa: B008 - frozen
        ranks: Ranks = ALONE,
    ) -> None:
        if not hasattr(loader, "__iter__"):
            remark = "; put a DataLoader around it" if hasattr(loader, "__getitem__") else ""
            raise TypeError(f"expected an iterable of batches, got {type(loader).__name__}{remark}")
        if isinstance(loader, Iterator):
            raise TypeError(f"expected a loader that can be iterated again, got a one-shot {type(loader).__name__}")
        self._loader, self._device, self._task, self._ranks = loader, device, task, ranks
        self._batches: Iterator[Any] | None = None
        self._ahead: Any = _NONE  # what was drawn to see whether the epoch is over
        self.batch_length = 0
        self._seed, self._epochs, self._seen = 0, 0, False
        self._alike: bool | None = None  # whether all ranks draw the same; None until they have drawn

    def restart(self, seed: int) -> None:
        """Begins a new epoch with every random generator seeded."""
        self._batches, self._ahead = None, _NONE
        self._seed, self._epochs = seed, 0
        seed_everything(seed, self._loader)

    def next(self) -> Batch:
        """The next batch; when an epoch ends a new one begins.

        Raises:
            ValueError: the loader is empty, or the batch holds NaN.
            TypeError: the batch is not what the task takes.
        """
        with callers_device():
            if self._look_ahead() is _END:
                self._batches, self._ahead = self._epoch(), _NONE
            item, self._ahead = self._look_ahead(), _NONE
        if item is _END:
            ended = "one that yields nothing the second time" if self._seen else "an empty one"
            raise ValueError(f"expected a loader with at least one batch, got {ended}")
        self._seen = True
        batch = checks.batch_of(item, self._device, self._task)
        self.batch_length = self.batch_length or length(batch)
        return batch

    def epoch_over(self) -> bool:
        """Whether the next batch begins a new epoch on the first rank; all have to ask, and get the same answer."""
        with callers_device():
            over = self._look_ahead() is _END
        return bool(self._ranks.from_first(torch.tensor(over)))

    def _look_ahead(self) -> Any:
        """What comes next in this epoch, which stays the next; _END if nothing does."""
        if self._ahead is _NONE:
            self._ahead = _END if self._batches is None else next(self._batches, _END)
        return self._ahead

    @property
    def before_lone(self) -> int | None:
        """How many batches of an epoch come before one of a single sample; None where no ``DataLoader`` says so."""
        sampler, size = getattr(self._loader, "sampler", None), getattr(self._loader, "batch_size", None)
        if not isinstance(sampler, Sized) or not size or getattr(self._loader, "drop_last", True):
            return None
        return len(sampler) // size if len(sampler) % size == 1 else None

    def take(self, images: int) -> Batch:
        """One batch of exactly ``images`` samples, joined from as many batches as that needs; the same on all ranks.

        Raises:
            ValueError: batches differ in more than their length, or ranks in more than the values of samples.
        """
        batches, found, before = [], 0, self._epochs
        while found < images:
            batches.append(self.next())
            found += length(batches[-1])
        if (epochs := self._epochs - before) > _MANY:
            log.info(
                "%d samples took %d epochs of the loader: fewer might say as much, and take less time", images, epochs
            )
        return self._common(head(joined(batches), images))

    def next_share(self) -> tuple[Batch, float]:
        """This rank's part of the samples that all ranks train on together, and its weight in their mean.

        Where all N ranks draw the same batches, each gets every Nth sample; otherwise its own batch, whole. Call
        :meth:`take` before, which finds out which case it is.

        Raises:
            ValueError: there are fewer samples than ranks.
        """
        batch, size = self.next(), self._ranks.size
        if size == 1 or not self._alike:
            return batch, 1.0
        count = length(batch)
        if count < size:
            raise ValueError(f"expected batches of a sample for each of {size} ranks, got {count}; try drop_last=True")
        own = pytree.tree_map(lambda t: t[self._ranks.rank :: size], batch)
        return own, length(own) * size / count

    def _epoch(self) -> Iterator[Any]:
        """An iterator over a new epoch, in a different order from earlier ones if the loader shuffles."""
        for sampler in counting_epochs(self._loader):
            sampler.set_epoch((self._seed * 1_000_003 + self._epochs) % 2**31)
        self._epochs += 1
        return iter(self._loader)

    def _common(self, batch: Batch) -> Batch:
        """The first rank's batch."""
        ranks = self._ranks
        if ranks.size == 1:
            return batch
        if others := ranks.differing(described(batch)):
            raise ValueError(
                f"expected batches of one kind on all ranks, but those on ranks {others} are unlike those on rank 0; "
                f"on rank {ranks.rank} they are {described(batch)}"
            )
        alike = not ranks.differing("", {str(index): tensor for index, tensor in enumerate(tensors(batch))})
        if self._alike is None:
            self._alike = alike
            each = "an equal part of every batch" if alike else "batches of its own, since loaders differ"
            log.info("each of %d ranks trains on %s", ranks.size, each)
        return batch if alike else pytree.tree_map(ranks.from_first, batch)
