"""The outputs of a network for many samples, and the loss of those of stacked jobs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.trace import Trace
from ..memory import Memory, raise_shortage
from ..models.batches import Batch, head, length, parts, tensors
from ..models.numerics import alike
from ..models.outputs import Form, leaves
from ..task import Task, cross_entropies
from .backward import gradients
from .stacking import Stacking

log = logging.getLogger("singe")


def outputs_in_parts(model: nn.Module, trace: Trace, batch: Batch, task: Task, memory: Memory) -> Any:
    """What a model answers to a batch, of which as many samples pass at a time as fit.

    Args:
        model: in eval mode, pruned or not.
        trace: of it, or of the model before it was pruned.
        batch: on its device.
        task: how it is called.
        memory: of a pass, met where the first samples get the same outputs in parts as together.
    """

    def in_parts(samples: Batch, step: int) -> Any:
        return _joined(trace, [task.outputs(model, part) for part in parts(samples, step)])

    def apart() -> bool:
        few = head(batch, 3)
        try:
            return alike(in_parts(few, length(few) - 1), task.outputs(model, few))
        except Exception as error:  # the model may not take every number of samples, nor its outputs be made anew
            raise_shortage(error)
            log.debug("passing samples in parts failed: %s", error)
            return False

    def outputs() -> Any:
        # some eight values as large as the largest are held at a time
        step = trace.samples_within(memory.size, 8 * trace.largest())
        if step >= length(batch) or not trace.dynamic:
            return task.outputs(model, batch)
        if apart():
            return in_parts(batch, step)
        log.info("samples cannot be passed in parts: the loss is that of all %d at once", length(batch))
        return task.outputs(model, batch)

    return memory.run(outputs)


def _joined(trace: Trace, outputs: Sequence[Any]) -> Any:
    """The outputs for all samples from those for some at a time; values other than tensors have to be the same."""
    nodes, stacking, values = iter(trace.outputs), Stacking(trace), list[Any]()
    for own in zip(*map(leaves, outputs), strict=True):
        if isinstance(own[0], Tensor):
            values.append(stacking.join(next(nodes), own))
        elif all(value == own[0] for value in own):
            values.append(own[0])
        else:
            raise ValueError(f"{own} differ between parts")
    return Form(outputs[0]).build(values)


class Judge:
    """Computes the loss of each of K jobs on one batch.

    Args:
        trace: of the model.
        stacking: how jobs lie in its values.
        task: how outputs are judged.
        batch: that they belong to.
    """

    def __init__(self, trace: Trace, stacking: Stacking, task: Task, batch: Batch) -> None:
        self._trace, self._stacking, self._task, self._batch = trace, stacking, task, batch
        self._size, self._device = length(batch), tensors(batch)[0].device.type

    def losses(self, outputs: Sequence[Tensor], count: int) -> Tensor:
        """[K]: each job's loss, of outputs in the dtype and memory format of the model itself."""
        nodes = self._trace.outputs
        own = [value.to(node.meta["val"].dtype).contiguous() for node, value in zip(nodes, outputs, strict=True)]
        with torch.autocast(self._device, enabled=False):
            if self._logits_alone(own, count):
                return cross_entropies(own[0], self._batch, count)
            parts = [self._stacking.unstack(*pair, count) for pair in zip(nodes, own, strict=True)]
            jobs = [self._trace.unflatten(part, self._size) for part in zip(*parts, strict=True)]
            return torch.stack([self._task.judge(outputs, self._batch) for outputs in jobs])

    def _logits_alone(self, outputs: Sequence[Tensor], count: int) -> bool:
        """Whether the default loss is to judge a single tensor, in which jobs lie one behind the other."""
        if self._task.loss is not None or [self._stacking.axis(node) for node in self._trace.outputs] != [0]:
            return False
        (logits,), samples = outputs, count * self._size
        return len(logits) == samples and isinstance(self._trace.unflatten(outputs, samples), Tensor)

    def summed(self, outputs: Sequence[Tensor], count: int) -> Tensor:
        """The losses' sum, to be differentiated; without a gradient where it depends on nothing that has one."""
        return self.losses(outputs, count).sum()

    def gradients(self, outputs: Sequence[Tensor], count: int) -> list[Tensor]:
        """The gradient of the losses' sum at every output; in place of one that has none, the output itself."""
        with torch.enable_grad():
            leaves = [out.detach().requires_grad_(out.is_floating_point() or out.is_complex()) for out in outputs]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(gradients([self.summed(leaves, count)], None, wanted))
        return [next(found) if leaf.requires_grad else leaf for leaf in leaves]
