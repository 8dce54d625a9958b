"""The network's task: how a batch is fed to it, and the scalar that its outputs are judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .graph.trace import Forward, answer, plain_call
from .memory import raise_shortage
from .models.batches import Batch, tensors
from .models.isolation import callers_device
from .models.outputs import cloned
from .models.precision import wide

Loss = Callable[[Any, Batch], Tensor]
"""(model outputs, batch) -> scalar."""

IGNORED = -100
"""The label of what the default loss does not count, as in torch."""


def cross_entropy(outputs: Any, batch: Batch) -> Tensor:
    """Mean cross-entropy of logits [B, classes, ...] against the class indices or probabilities y of (x, y)."""
    logits, y = _logits_and_targets(outputs, batch)
    with _explained(outputs.shape, batch[1]):
        return F.cross_entropy(logits, y)


def cross_entropies(outputs: Tensor, batch: Batch, copies: int) -> Tensor:
    """[copies]: the same of several networks at once, whose logits lie one behind the other in [copies * B, ...]."""
    logits, y = _logits_and_targets(outputs, batch)
    count = y.numel() // y.shape[1] if y.is_floating_point() else counted(y).sum()
    with _explained((len(outputs) // copies, *outputs.shape[1:]), batch[1]):
        each = F.cross_entropy(logits, y.repeat(copies, *[1] * (y.dim() - 1)), reduction="none")
    total = each.unflatten(0, (copies, -1)).flatten(1).sum(1, dtype=torch.float64)
    return (total / count).to(logits.dtype)


def counted(labels: Tensor) -> Tensor:
    """Which labels the default loss counts."""
    return labels.long() != IGNORED  # bytes hold none


def _logits_and_targets(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Both as ``F.cross_entropy`` takes them."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"expected the model to return a tensor of logits for the default loss, got {type(outputs).__name__}; "
            "pass loss=(outputs, batch) -> scalar"
        )
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(f"expected batches (x, y) for the default loss, got {type(batch).__name__}; pass loss=")
    y = batch[1]
    if y.is_floating_point() and y.shape[1:] == outputs.shape[1:] and not _are_probabilities(y):
        raise ValueError(
            "expected class indices, or probabilities of classes that sum to 1, for the default loss (cross-entropy), "
            f"got y of {y.dtype} and shape {tuple(y.shape)} in [{y.min():g}, {y.max():g}]; for regression or several "
            "labels pass loss=(outputs, batch) -> scalar"
        )
    logits = wide(outputs)  # half types would give many networks the same loss
    return logits, y.to(logits.dtype) if y.is_floating_point() else y


@contextmanager
def _explained(shape: Sequence[int], y: Tensor) -> Iterator[None]:
    """Says what did not fit."""
    try:
        yield
    except (IndexError, ValueError, RuntimeError) as error:
        raise_shortage(error)
        labels = f"{y.dtype} in [{y.min()}, {y.max()}]" if y.numel() else str(y.dtype)
        raise ValueError(
            f"expected class indices or probabilities y that fit logits of shape {tuple(shape)}, got y of "
            f"shape {tuple(y.shape)}, {labels}: {error}"
        ) from error


def _are_probabilities(y: Tensor) -> bool:
    """Whether y [B, classes, ...] holds probabilities of more than one class."""
    return y.dim() > 1 and y.shape[1] > 1 and bool((y >= 0).all() and ((y.sum(1) - 1).abs() < 0.02).all())


def _versions(batch: Batch) -> list[int]:
    """How often each tensor has been written to; of those made in inference mode nobody knows."""
    return [t._version for t in tensors(batch) if isinstance(t, Tensor) and not t.is_inference()]


def differentiable(loss: Tensor) -> Tensor:
    """The loss itself.

    Raises:
        ValueError: it has no gradient.
    """
    if not loss.requires_grad:
        raise ValueError("expected a loss that depends smoothly on the weights, got one without a gradient")
    return loss


@dataclass(frozen=True)
class Task:
    """How the user runs and judges the network.

    Args:
        forward: (model, batch) -> outputs, for batches of any nested tensors; ``model(x)`` for (x, y) by default.
        loss: (outputs, batch) -> scalar; mean cross-entropy by default.
    """

    forward: Forward | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        for name in ("forward", "loss"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"expected {name} to be a function, got {type(value).__name__}")

    @property
    def call(self) -> Forward:
        """(model, inputs) -> outputs."""
        return plain_call if self.forward is None else self.forward

    @property
    def objective(self) -> Loss:
        """(outputs, batch) -> scalar."""
        return cross_entropy if self.loss is None else self.loss

    def inputs(self, batch: Batch) -> Batch:
        """The part of a batch that the network sees: x of (x, y), or all of it where ``forward`` is the user's."""
        return batch[0] if self.forward is None else batch

    def outputs(self, model: nn.Module, batch: Batch) -> Any:
        """What the network answers to a batch."""
        return answer(model, self.inputs(batch), self.call)

    def judge(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of ``outputs``, a scalar tensor; they stay as they are, even if it works in place.

        Raises:
            TypeError: the loss is not a tensor of real numbers.
            ValueError: it is not a scalar, or writes to the batch's tensors.
        """
        if self.loss is None:
            return cross_entropy(outputs, batch)
        before, own = _versions(batch), cloned(outputs)
        try:
            with callers_device():
                value = self.objective(own, pytree.tree_map(lambda t: t, batch))  # containers of its own
        except (TypeError, AttributeError) as error:
            raise TypeError(
                f"expected loss(outputs, batch) -> scalar, with batch as the loader yields it, but calling "
                f"{self.loss!r} failed: {error}; a loss of (outputs, y) is passed as "
                "lambda outputs, batch: loss(outputs, batch[1])"
            ) from error
        if _versions(batch) != before:
            raise ValueError(
                "expected loss(outputs, batch) to leave the batch as it is, but it writes to its tensors; clone these"
            )
        if not isinstance(value, Tensor):
            raise TypeError(f"expected loss(outputs, batch) to return a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"expected loss(outputs, batch) to return a real number, got {value.dtype}")
        if value.numel() != 1:
            raise ValueError(f"expected loss(outputs, batch) to return a scalar, got shape {tuple(value.shape)}")
        return value.reshape(())

    def lesson(self, outputs: Any, batch: Batch) -> Tensor:
        """What a step of training minimises: the loss, but zero where the default one counts no label.

        There is nothing to learn from such a batch, of which the mean over labels is not a number, and no harm in it.
        """
        loss = self.judge(outputs, batch)
        if self.loss is not None or batch[1].is_floating_point():
            return loss
        return torch.where(counted(batch[1]).any(), loss, loss.nan_to_num())

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of the network on a batch."""
        return self.judge(self.outputs(model, batch), batch)
