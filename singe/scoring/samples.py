"""Whether the samples of a batch affect each other: tried out, since a graph does not show it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..graph.trace import Trace
from ..memory import raise_shortage
from ..models.numerics import close
from .jobs import Jobs, whole_group
from .stacking import Stacking

log = logging.getLogger("singe")

Outputs = list[Tensor]
"""The model's outputs, one by one."""


class Samples:
    """Tries out which samples may run together.

    Args:
        name: of the group, for the log.
        trace: of the model.
        stacking: of its values.
        coarse: whether numbers are of less than single precision.
    """

    def __init__(self, name: str, trace: Trace, stacking: Stacking, coarse: bool) -> None:
        self._name, self._trace, self._stacking, self._coarse = name, trace, stacking, coarse

    @torch.no_grad()
    def stack(self, outputs: Callable[[Jobs], Outputs]) -> bool:
        """Whether two different jobs together give the same outputs as each alone."""
        alone = [outputs(whole_group(t)) for t in (1.0, 0.5)]
        try:
            stacked = outputs(whole_group(1.0, 0.5))
            parts = [self._stacking.unstack(*pair, 2) for pair in zip(self._trace.outputs, stacked, strict=True)]
        except Exception as error:  # the model or the loss may not take more samples at once, or not make as many
            return self._failed("stacking two jobs", error)
        return all(
            self._agree(part, expected)
            for both, *each in zip(parts, *alone, strict=True)
            for part, expected in zip(both, each, strict=True)
        )

    @torch.no_grad()
    def part(self, outputs: Callable[[int, int], Outputs]) -> bool:
        """Whether the first two samples together give the same as each alone: ``outputs(start, size)``."""
        try:
            pair, *alone = (outputs(start, size) for start, size in ((0, 2), (0, 1), (1, 1)))
        except Exception as error:  # the model may not take one sample alone
            return self._failed("passing images in parts", error)
        return all(map(self._agree, pair, self._stacking.join_outputs(alone)))

    def _failed(self, what: str, error: Exception) -> bool:
        raise_shortage(error)
        log.debug("%s: %s failed: %s", self._name, what, error)
        return False

    def _agree(self, actual: Tensor, expected: Tensor) -> bool:
        if self._coarse and expected.is_floating_point():
            return close(actual.bfloat16(), expected.bfloat16())
        return close(actual, expected)
