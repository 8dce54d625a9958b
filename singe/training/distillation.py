"""Learning from the unpruned network: from its answers and from the inputs of its layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import checks
from ..models.batches import Batch
from ..models.precision import wide
from ..ranks import ALONE, Ranks
from ..removal.surgery import Removed
from ..task import Task
from .hints import Hints, Reads, reading

TEMPERATURE = 4.0
"""The temperature that logits are divided by, so that answers which are not the likeliest count, too."""


class Teacher:
    """The unpruned network, whose answers are targets.

    Args:
        model: copied, and put into eval mode.
        task: how it is called.
        share: of the loss that is the divergence from its answers.
        weight: of an added loss term, the distance from the inputs of its layers.
        ranks: that train together.
    """

    def __init__(self, model: nn.Module, task: Task, share: float, weight: float, ranks: Ranks = ALONE) -> None:
        self._model, self._task, self._share, self._weight = checks.working_copy(model), task, share, weight
        self._hints = Hints(self._model, ranks)

    def keep(self, removed: Removed) -> None:
        """Sets what has been removed in the learning network: (tensor name, axis) -> indices."""
        self._hints.keep(removed)

    def reading(self, model: nn.Module) -> AbstractContextManager[Reads]:
        """Records the inputs of the learning network's layers, if they count."""
        return reading(model) if self._weight else nullcontext({})

    def loss(self, loss: Tensor, outputs: Any, reads: Reads, batch: Batch) -> Tensor:
        """The loss to train with on a batch.

        Args:
            loss: without a teacher.
            outputs: logits [B, classes, ...], if answers count.
            reads: inputs of the layers on the way there.
            batch: that the outputs belong to.

        Raises:
            ValueError: the outputs are not logits, or not of the unpruned network's shape; or no layer's inputs can be
                compared.
        """
        with torch.no_grad(), self.reading(self._model) as theirs:
            wanted = self._task.outputs(self._model, batch)
        if self._share:
            loss = (1 - self._share) * loss + self._share * divergence(outputs, wanted)
        return loss + self._weight * self._hints.distance(reads, theirs) if self._weight else loss


def divergence(outputs: Any, wanted: Any) -> Tensor:
    """How far a pruned network's answers are from the unpruned one's (Hinton et al. 2015).

    T^2 KL(softmax(wanted / T) || softmax(outputs / T)), the mean over samples and positions.

    Args:
        outputs: logits [B, classes, ...].
        wanted: those of the unpruned network.

    Raises:
        ValueError: they are not logits, or differ in shape.
    """
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
