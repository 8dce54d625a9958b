"""Batch norm statistics of a network whose weights have changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.batches import length
from ..task import Task
from .data import Stream

log = logging.getLogger("singe")


def running_norms(model: nn.Module, still: Sequence[str] = ()) -> list[_BatchNorm]:
    """The batch norms that keep statistics, except for those that are ``still``."""
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    return [norm for name, norm in norms if norm.running_mean is not None and name not in still]


@torch.no_grad()
def recalibrate(model: nn.Module, stream: Stream, task: Task, images: int, still: Sequence[str] = ()) -> None:
    """Replaces the running mean and variance of every batch norm by their average over some batches.

    Only batch norms are in train mode meanwhile, so that dropout does not disturb their inputs.

    Args:
        model: in eval mode, changed in place.
        stream: of batches.
        task: how the model is called.
        images: the least number of samples to draw, in whole batches.
        still: names of modules that keep their statistics.

    Raises:
        ValueError: the network cannot normalise the loader's batches, since they have one sample each.
    """
    norms = running_norms(model, still)
    if not norms:
        log.warning("recalibrate_bn changes nothing: the network has no batch norm with running statistics to change")
        return
    before = {n: (n.momentum, [s.clone() for s in _statistics(n)]) for n in norms}
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    try:
        seen = count = lone = 0
        while seen < images:
            batch = stream.next()
            so_far = [[s.clone() for s in _statistics(n)] for n in norms] if length(batch) == 1 else []
            for norm in norms:
                norm.momentum = 1 / (count + 1)  # the plain average of all batches
            try:
                task.outputs(model, batch)
                seen, count = seen + length(batch), count + 1
            except ValueError as error:
                lone += 1  # the last batch of an epoch may be too small to have a variance
                if length(batch) > 1 or lone > images:
                    raise ValueError(f"expected batches that batch norms can be recalibrated on: {error}") from error
                for norm, then in zip(norms, so_far, strict=True):  # those before the one that failed have seen it
                    _set_statistics(norm, then)
    finally:
        for norm, (momentum, statistics) in before.items():
            norm.momentum = momentum
            norm.eval()
            mean, var, _ = _statistics(norm)
            if not mean.any() and var.eq(1).all():  # eval mode never reaches it
                _set_statistics(norm, statistics)


def _statistics(norm: Any) -> list[Tensor]:
    return [norm.running_mean, norm.running_var, norm.num_batches_tracked]


def _set_statistics(norm: _BatchNorm, values: Sequence[Tensor]) -> None:
    for now, then in zip(_statistics(norm), values, strict=True):
        now.copy_(then)
