"""Values of several jobs, or of several parts of the images, along one batch axis."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..graph.trace import Trace


class Stacking:
    """Copies, cuts and joins the values of a trace's nodes along their batch axes; values without one are shared."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def stack(self, node: fx.Node, value: Tensor, count: int) -> Tensor:
        """``count`` copies of a value."""
        axes = self._trace.batch_axes(node)
        if not axes or count == 1:
            return value
        if len(axes) > 1:
            raise ValueError(f"{node} depends on the batch along several axes")
        return torch.cat([value] * count, dim=axes[0])

    def unstack(self, node: fx.Node, value: Tensor, count: int) -> list[Tensor]:
        """The ``count`` values that are stacked in one."""
        axis = self.axis(node)
        if axis is None:
            return [value] * count
        return self.split(node, value, [1] * count)

    def split(self, node: fx.Node, value: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The parts of a value that belong to ``sizes`` samples each."""
        axis = self.axis(node)
        if axis is None:
            return [value] * len(sizes)
        each = value.shape[axis] // sum(sizes)  # more than one where the model flattens something into the axis
        return list(value.split([size * each for size in sizes], dim=axis))

    def join(self, node: fx.Node, parts: Sequence[Tensor]) -> Tensor:
        """Undoes ``split``."""
        axis = self.axis(node)
        return parts[0] if axis is None or len(parts) == 1 else torch.cat(list(parts), dim=axis)

    def join_outputs(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The model's outputs for all samples, of those for some at a time."""
        return [self.join(*pair) for pair in zip(self._trace.outputs, zip(*parts, strict=True), strict=True)]

    def split_outputs(self, outputs: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
        """Undoes ``join_outputs``."""
        split = [self.split(*pair, sizes) for pair in zip(self._trace.outputs, outputs, strict=True)]
        return list(zip(*split, strict=True))

    def axis(self, node: fx.Node) -> int | None:
        """Along which jobs lie in a node's value; None where it does not depend on the batch."""
        return next(iter(self._trace.batch_axes(node)), None)
