"""The scalar that gradients are taken of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Any, Batch], Tensor]
"""(model outputs, (x, y)) -> scalar."""


def cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of logits [B, classes, ...] against the class indices or probabilities in ``batch``."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"expected the model to return a tensor of logits for the default loss, got {type(outputs).__name__}; "
            "pass loss=(outputs, batch) -> scalar"
        )
    try:
        return F.cross_entropy(outputs, batch[1])
    except (IndexError, ValueError, RuntimeError) as error:
        y = batch[1]
        labels = f"{y.dtype} in [{y.min()}, {y.max()}]" if y.numel() else str(y.dtype)
        raise ValueError(
            f"expected class indices or probabilities y that fit logits of shape {tuple(outputs.shape)}, got y of "
            f"shape {tuple(y.shape)}, {labels}: {error}"
        ) from error


def scalar(loss: Loss, outputs: Any, batch: Batch) -> Tensor:
    """Evaluates a loss and checks that it is a scalar.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: it is not a scalar.
    """
    try:
        value = loss(outputs, batch)
    except TypeError as error:
        raise TypeError(
            f"expected loss(outputs, batch) -> scalar with batch = (x, y), but calling {loss!r} failed: {error}; "
            "a loss of (outputs, y) is passed as lambda outputs, batch: loss(outputs, batch[1])"
        ) from error
    if not isinstance(value, Tensor):
        raise TypeError(f"expected loss(outputs, batch) to return a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"expected loss(outputs, batch) to return a real number, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"expected loss(outputs, batch) to return a scalar, got shape {tuple(value.shape)}")
    return value.reshape(())
