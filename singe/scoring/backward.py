"""Backward passes that may lead nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(ends: Sequence[Tensor], at_ends: Sequence[Tensor] | None, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What reaches ``inputs`` going backwards; zeros where no path leads to any that has a gradient.

    Args:
        ends: where the backward pass begins.
        at_ends: the gradient there, of each; 1 for scalars by default.
        inputs: where it leads.
    """
    if at_ends is None:
        at_ends = [torch.ones_like(end) for end in ends]
    reached = [(end, own) for end, own in zip(ends, at_ends, strict=True) if end.requires_grad]
    if not reached:  # detached, or followed by whole numbers alone
        return [torch.zeros_like(t) for t in inputs]
    ends, at_ends = zip(*reached, strict=True)
    return list(torch.autograd.grad(ends, inputs, at_ends, materialize_grads=True))
