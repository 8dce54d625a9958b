"""What the unpruned network answers and what its layers read, for a pruned one to learn from."""

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
"""What logits are divided by, so that answers which are not the likeliest count, too."""


class Teacher:
    """A network as it was, whose answers are targets.

    Args:
        model: copied, and put into eval mode.
        task: how it is called.
        share: of the loss that is the divergence from its answers.
        weight: of the distance from what its layers read, beside the loss.
        ranks: that train together.
    """

    def __init__(self, model: nn.Module, task: Task, share: float, weight: float, ranks: Ranks = ALONE) -> None:
        self._model, self._task, self._share, self._weight = checks.copied(model), task, share, weight
        self._hints = Hints(self._model, ranks)

    def keep(self, removed: Removed) -> None:
        """Says what of the network is gone in the one that learns: (tensor name, axis) -> indices."""
        self._hints.keep(removed)

    def reading(self, model: nn.Module) -> AbstractContextManager[Reads]:
        """Notes what the layers of the network that learns read, if that counts."""
        return reading(model) if self._weight else nullcontext({})

    def loss(self, loss: Tensor, outputs: Any, reads: Reads, batch: Batch) -> Tensor:
        """What is to be learnt on a batch.

        Args:
            loss: without a teacher.
            outputs: logits [B, classes, ...], if answers count.
            reads: what layers have read on the way there.
            batch: what the outputs answer.

        Raises:
            ValueError: the outputs are no logits, or not of the unpruned network's shape; or no layer's reads can be
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
        ValueError: they are no logits, or differ in shape.
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
