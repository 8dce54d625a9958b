"""What the unpruned network answers, for a pruned one to learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from ..models.batches import Batch
from ..models.precision import wide
from ..task import Task

TEMPERATURE = 4.0
"""What logits are divided by, so that answers which are not the likeliest count, too."""


class Teacher:
    """A network as it was, whose answers are targets.

    Args:
        model: copied, and put into eval mode.
        task: how it is called.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._model, self._task = checks.copied(model), task

    def divergence(self, outputs: Any, batch: Batch) -> Tensor:
        """How far a pruned network's answers are from the unpruned one's on a batch (Hinton et al. 2015).

        T^2 KL(softmax(teacher / T) || softmax(outputs / T)), the mean over samples and positions.

        Args:
            outputs: logits [B, classes, ...].
            batch: what they answer.

        Raises:
            ValueError: they are no logits, or not of the unpruned network's shape.
        """
        with torch.no_grad():
            wanted = self._task.outputs(self._model, batch)
        for answer in (outputs, wanted):
            if not isinstance(answer, Tensor) or answer.dim() < 2 or not answer.is_floating_point():
                what = f"{tuple(answer.shape)} {answer.dtype}" if isinstance(answer, Tensor) else type(answer).__name__
                raise ValueError(f"expected logits [B, classes, ...] to distil from, got {what}; pass distill=0")
        if outputs.shape != wanted.shape:
            raise ValueError(
                f"expected the same answer in train and in eval mode to distil from, got shapes {tuple(outputs.shape)} "
                f"and {tuple(wanted.shape)}; pass distill=0"
            )
        ours, theirs = (F.log_softmax(wide(logits) / TEMPERATURE, 1) for logits in (outputs, wanted.detach()))
        each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)
        return TEMPERATURE**2 * each.mean()
