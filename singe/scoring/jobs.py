"""Points on fading paths, and values scaled by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jobs:
    """K points on fading paths.

    Attributes:
        neuron: int64 [K], the neuron that fades in each; None fades the whole group.
        t: float64 [K], what its weights are multiplied by.
        weight: float64 [K], the quadrature's weight of the point.
    """

    neuron: Tensor | None
    t: Tensor
    weight: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def rows(self, rows: Tensor) -> Tensor:
        """int64 [K, R']: the rows each job fades, from the rows of every neuron [n, R]."""
        return rows.flatten().expand(len(self), -1) if self.neuron is None else rows[self.neuron]

    def scale(self, rows: Tensor, width: int, like: Tensor) -> Tensor:
        """[K, width] in the dtype of ``like``: t at each job's rows, 1 elsewhere."""
        scale = torch.ones(len(self), width, dtype=torch.float64, device=like.device)
        faded = beside(self.rows(rows), like)
        return scale.scatter_(1, faded, beside(self.t, like)[:, None].expand_as(faded)).to(like.dtype)


def beside(value: Tensor, like: Tensor) -> Tensor:
    """A value of the CPU on the device of another tensor; without waiting for what that device has to do first."""
    return value.to(like.device, non_blocking=True)


def whole_group(*t: float) -> Jobs:
    """One job for each t, which fades the whole group."""
    points = torch.tensor(t, dtype=torch.float64)
    return Jobs(None, points, torch.ones_like(points))


def spread(per_job: Tensor, value: Tensor, axis: int) -> Tensor:
    """[K, channels] so that it broadcasts to value [K*B, ..., channels, ...] with channels along ``axis``."""
    repeated = per_job.repeat_interleave(len(value) // len(per_job), dim=0)
    shape = [1] * value.dim()
    shape[0], shape[axis] = repeated.shape
    return repeated.view(shape)
