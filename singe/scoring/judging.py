"""The loss of the outputs of stacked jobs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..graph.downstream import Downstream
from ..graph.trace import Trace
from ..models.batches import Batch, length, tensors
from ..task import Task
from .stacking import Stacking


class Judge:
    """Computes the loss of each of K jobs on one batch.

    Args:
        trace: of the model.
        down: the part of it that runs for a job.
        stacking: how jobs are arranged in its values.
        task: how outputs are judged.
        batch: that they belong to.
    """

    def __init__(self, trace: Trace, down: Downstream, stacking: Stacking, task: Task, batch: Batch) -> None:
        self._trace, self._stacking, self._task, self._batch = trace, stacking, task, batch
        self._cached = {*down.suffix.boundary, *down.suffix.roots}
        self._size, self._device = length(batch), tensors(batch)[0].device.type

    def losses(self, outputs: Sequence[Tensor], count: int) -> Tensor:
        """[K]: each job's loss, of outputs in the dtype and memory format of the model itself."""
        nodes = self._trace.outputs
        own = [self._presented(*pair) for pair in zip(nodes, outputs, strict=True)]
        parts = [self._stacking.unstack(*pair, count) for pair in zip(nodes, own, strict=True)]
        jobs = [self._trace.unflatten(part, self._size) for part in zip(*parts, strict=True)]
        with torch.autocast(self._device, enabled=False):
            return torch.stack([self._task.judge(outputs, self._batch) for outputs in jobs])

    def summed(self, outputs: Sequence[Tensor], count: int) -> Tensor:
        """The losses' sum, to be differentiated.

        Raises:
            ValueError: it has no gradient.
        """
        losses = self.losses(outputs, count)
        if not losses.requires_grad:
            raise ValueError("expected a loss that depends smoothly on the outputs, got one without a gradient")
        return losses.sum()

    def gradients(self, outputs: Sequence[Tensor], count: int) -> list[Tensor]:
        """The gradient of the losses' sum at every output; in place of one that has none, the output itself."""
        with torch.enable_grad():
            leaves = [out.detach().requires_grad_(out.is_floating_point() or out.is_complex()) for out in outputs]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(self.summed(leaves, count), wanted, materialize_grads=True))
        return [next(found) if leaf.requires_grad else leaf for leaf in leaves]

    def _presented(self, node: fx.Node, value: Tensor) -> Tensor:
        """An output as the model itself would give it, which may be written to: neither cached nor a leaf."""
        value = value.to(node.meta["val"].dtype).contiguous()
        return value.clone() if node in self._cached or (value.is_leaf and value.requires_grad) else value
