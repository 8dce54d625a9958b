"""The share of samples that a network classifies correctly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .. import checks
from ..models.isolation import evaluating, preserved_random_state
from ..task import IGNORED, Task, counted


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The share of labels that are the class of the largest logit, in [0, 1], in eval mode; -100 is no label.

    Args:
        model: returns logits [B, classes, ...]; its mode is restored afterwards.
        batches: pairs of inputs x [B, ...] and labels y, int [B, ...], with -100 where the default loss sees none.

    Raises:
        TypeError, ValueError: no batches, or other ones; or outputs that are not logits for such labels.
    """
    device, task, right, total = checks.device_of(model), Task(), 0, 0
    with evaluating([model]), preserved_random_state(batches):  # a loader may shuffle
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(f"expected batches (x, y) to measure accuracy on, got {type(batch).__name__}")
            x, y = checks.batch_of(batch, device, task)
            logits = model(x)
            if not isinstance(logits, Tensor) or logits.dim() < 2 or logits[:, 0].shape != y.shape:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(
                    f"expected logits [B, classes, ...] for labels of shape {tuple(y.shape)} to measure accuracy, got "
                    f"{found}"
                )
            known = counted(y)
            right += int((logits.argmax(1) == y)[known].sum())
            total += int(known.sum())
    if not total:
        raise ValueError(f"expected batches with labels other than {IGNORED} to measure accuracy on, got none")
    return right / total
