"""Records as scalars for TensorBoard."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import torch

from .records import GroupRecord, Record, RoundRecord


class TensorBoard:
    """A callback of :func:`singe.prune` or ``GradualPruner`` that writes every record for TensorBoard.

    ::

        with singe.TensorBoard("runs/pruned") as board:
            result = singe.prune(model, loader, rho=0.5, evaluate=accuracy, callbacks=[board])

    Losses, evaluation, units removed and seconds are scalars, and a group's first scores a histogram, over the number
    of groups (or layers) done, or over the epoch of the round. Everything is written to disk after each record.

    Args:
        logdir: a directory, created if it does not exist.

    Raises:
        ImportError: the package tensorboard is missing.
    """

    def __init__(self, logdir: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("singe.TensorBoard needs tensorboard: pip install 'singe[tensorboard]'") from error
        self._writer, self._step, self._gone = SummaryWriter(os.fspath(logdir)), 0, 0

    def __call__(self, record: Record) -> None:
        """Writes a record."""
        self._step += 1
        step = record.epoch if isinstance(record, RoundRecord) else self._step
        self._gone += _gone(record)
        for name, value in (_scalars(record) | {"removed": self._gone}).items():
            self._writer.add_scalar(name, value, step)
        if isinstance(record, GroupRecord) and record.first_scores:
            self._writer.add_histogram("scores", torch.tensor(record.first_scores, dtype=torch.float64), step)
        if not isinstance(record, RoundRecord):
            name = record.group if isinstance(record, GroupRecord) else record.weight
            self._writer.add_text("name", name, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _gone(record: Record) -> int:
    """How many units were removed."""
    if isinstance(record, RoundRecord):
        return record.channels
    return len(record.removed) if isinstance(record, GroupRecord) else record.removed


def _scalars(record: Record) -> dict[str, Any]:
    """The numbers of a record, ``loss_start`` as ``loss/start``; without those that it does not have."""
    names = ("loss_", "seconds", "evaluation")
    held = {name: value for name, value in vars(record).items() if name.startswith(names) and value is not None}
    return {name.replace("_", "/", 1): value for name, value in held.items()}
