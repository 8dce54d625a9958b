"""Whether a pruned network still knows what it knew: a warning, since accuracy can be lost unnoticed."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..memory import raise_shortage
from ..models.batches import Batch, length
from ..task import Task

log = logging.getLogger("singe")


class Watch:
    """Compares the losses before and after on one batch with that of a network that knows nothing.

    Args:
        outputs: of the model before pruning.
        batch: the samples that they are for.
        task: how they are judged.

    Attributes:
        loss: of the model on the batch before pruning.
    """

    @torch.no_grad()
    def __init__(self, outputs: Any, batch: Batch, task: Task) -> None:
        self._batch, self._task = batch, task
        self.loss = float(task.judge(outputs, batch))
        self._constant = self._constant_answer(outputs)

    def _constant_answer(self, outputs: Any) -> float:
        """The loss of giving every sample one answer, the mean output or less of it; NaN where there is none."""
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            return math.nan
        mean = outputs.mean(0, keepdim=True).expand_as(outputs)
        try:
            return min(float(self._task.judge(mean * part, self._batch)) for part in (0, 0.25, 0.5, 1))
        except Exception as error:  # the loss may not take what no network would answer, such as a variance of 0
            raise_shortage(error)
            log.debug("no loss of a constant answer to compare with: %s", error)
            return math.nan

    def warn(self, loss: float, remedies: Sequence[str]) -> None:
        """Warns if more than half of what was known beyond a constant answer is lost, or far more than was ever known.

        Args:
            loss: of the pruned model on the batch.
            remedies: what could be done about it, for people to read.
        """
        knew = self._constant - self.loss
        knew_something = knew > 0.05 * abs(self._constant)
        far_worse = min(self._constant, self.loss) > 0 and loss > 2 * max(self._constant, self.loss)
        if not math.isfinite(loss) or (knew_something and loss > self.loss + knew / 2) or far_worse:
            log.warning(
                "the pruned network may have collapsed: its loss on %d samples is %.3f, it was %.3f before pruning, "
                "and a constant answer has %.3f; remedies: %s",
                length(self._batch), loss, self.loss, self._constant, ", ".join(remedies),
            )  # fmt: skip
