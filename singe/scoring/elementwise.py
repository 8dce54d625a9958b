"""Criteria on single weights: the norms of one number are its absolute value, so that p does not matter.

The path is that of the layer, t W for all its weights at once, t in (0, 1]; biases and batch norms stay as they are.
Batch norms are not folded in: folding would scale a weight by the factor by which it divides its gradient, so that
products of the two are the same, and magnitudes or gradients alone are those of the weight in the model.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ..criteria import Criterion, Magnitude, PathCriterion, Random
from ..graph.suffix import cut
from ..graph.trace import Env, Trace
from ..memory import Memory
from ..models.batches import Batch, length
from ..models.precision import Precision, arithmetic
from ..quadrature import Nodes
from ..ranks import ALONE, Ranks
from ..task import Task
from .backward import gradients
from .judging import Judge
from .samples import Samples
from .stacking import Stacking

log = logging.getLogger("singe")


class WeightScorer:
    """Scores every single weight of one parameter on one batch.

    Args:
        model: in eval mode, read as it is.
        trace: of that model.
        parameter: its qualified name, the first of several.
        batch: on the model's device.
        task: how the model is called and judged.
        memory: upper bound, in bytes, of the activations of a pass, met where images can be split.
        precision: of the passes.
        ranks: that share the nodes of the path.

    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        parameter: str,
        batch: Batch,
        task: Task,
        memory: int,
        precision: Precision = "float32",
        ranks: Ranks = ALONE,
    ) -> None:
        self._name, self._weight = parameter, model.get_parameter(parameter).detach()
        self._memory = Memory(parameter, memory, self._weight.device)
        self._make = lambda: Gradients(model, trace, parameter, batch, task, self.memory, precision)
        self._precision, self._ranks = precision, ranks

    @property
    def memory(self) -> int:
        """What ``memory`` has come down to where the device had no room for that."""
        return self._memory.size

    def scores(self, criterion: Criterion) -> Tensor:
        """float32 or float64, of the parameter's shape and on its device; smallest for the least relevant.

        Raises:
            ValueError: a score is not finite.
        """
        if isinstance(criterion, Random):
            return self._ranks.from_first(torch.rand(self._weight.shape)).to(self._weight.device)
        magnitude = self._weight.abs().to(torch.promote_types(self._weight.dtype, torch.float32))
        if isinstance(criterion, Magnitude):
            return magnitude
        assert isinstance(criterion, PathCriterion), criterion
        rule = criterion.rule()
        own = self._ranks.share(len(rule.nodes[0]))
        scores = self._ranks.sum(self._memory.run(lambda: self._summed((rule.nodes[0][own], rule.nodes[1][own]))))
        if rule.with_norm:
            scores *= magnitude
        if not scores.isfinite().all():
            raise ValueError(f"scores of {self._name} are not finite: the loss or its gradient overflows")
        return scores

    def _summed(self, nodes: Nodes) -> Tensor:
        with arithmetic(self._precision, self._weight.device):
            return self._make().summed(nodes)


class Gradients:
    """The loss's gradient at one parameter while it fades; the network before it runs once if all images fit.

    Args:
        model, trace, parameter, batch, task, memory, precision: as of :class:`WeightScorer`.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        parameter: str,
        batch: Batch,
        task: Task,
        memory: int,
        precision: Precision = "float32",
    ) -> None:
        self._trace, self._inputs, self._images, self._name = trace, task.inputs(batch), length(batch), parameter
        self._live, self._stacking = trace.live(model), Stacking(trace)
        self._places = [node for node, name in trace.state.items() if name == parameter]
        self._weight = self._live[self._places[0]]
        self._suffix = cut(trace, self._places)
        self._judge = Judge(trace, self._stacking, task, batch)
        self._samples = Samples(parameter, trace, self._stacking, coarse=precision != "float32")
        self._sizes = self._divided(memory)

    def summed(self, nodes: Nodes) -> Tensor:
        """The sum over the nodes of weight * |dL/d(tW)|, of the parameter's shape, in float32 at least."""
        total = torch.zeros_like(self._weight, dtype=torch.promote_types(self._weight.dtype, torch.float32))
        for t, weight in zip(*(v.tolist() for v in nodes), strict=True):
            total += weight * self.at(t).abs().to(total.dtype)
        return total

    def at(self, t: float) -> Tensor:
        """dL/d(tW), of the parameter's shape and dtype."""
        faded, total = (t * self._weight).requires_grad_(), torch.zeros_like(self._weight)
        if len(self._sizes) == 1:
            with torch.enable_grad():
                return gradients([self._judge.summed(self._outputs(faded, 0), 1)], None, [faded])[0]
        for index, wanted in enumerate(self._at_outputs(faded)):
            with torch.enable_grad():
                total += gradients(self._outputs(faded, index), wanted, [faded])[0]
        return total

    def _at_outputs(self, faded: Tensor) -> list[tuple[Tensor, ...]]:
        """The loss's gradient at the model's outputs, for every part of the images."""
        with torch.no_grad():
            each = [self._outputs(faded, index) for index in range(len(self._sizes))]
        gradients = self._judge.gradients(self._stacking.join_outputs(each), 1)
        return self._stacking.split_outputs(gradients, self._sizes)

    def _outputs(self, faded: Tensor, part: int) -> list[Tensor]:
        """The model's outputs for a part of the images."""
        before = self._before if len(self._sizes) == 1 else self._prefix(sum(self._sizes[:part]), self._sizes[part])
        env = self._live | before | dict.fromkeys(self._places, faded)
        self._trace.run(self._suffix.nodes, env, self._sizes[part], keep=self._trace.outputs)
        return [env[node] for node in self._trace.outputs]

    @cached_property
    def _before(self) -> Env:
        return self._prefix(0, self._images)

    def _prefix(self, start: int, size: int) -> Env:
        """What the suffix reads of some of the images."""
        return self._run(self._suffix.prefix, self._suffix.boundary, start, size)

    def _run(self, nodes: Sequence[fx.Node], keep: Collection[fx.Node], start: int, size: int) -> Env:
        """Values of the network as it is, for some of the images."""
        env = self._live | {node: value[start : start + size] for node, value in self._trace.feed(self._inputs).items()}
        with torch.no_grad():
            self._trace.run(nodes, env, size, keep=keep)
        return {node: env[node] for node in keep}

    def _divided(self, memory: int) -> list[int]:
        """Parts of how many images pass one after the other."""
        images = self._images
        sizes = [self._trace.nbytes([node], images) for node in self._suffix.nodes]
        # values stay for the backward pass, gradients are short-lived
        needed = sum(sizes) + 3 * max(sizes, default=0) + self._trace.nbytes(self._suffix.boundary, images)
        if needed <= memory or images == 1:
            return [images]
        if not self._may_part():
            log.warning("%s: samples cannot be passed in parts, a pass takes %d bytes", self._name, needed)
            return [images]
        step = max(1, images * memory // needed)
        return [min(step, images - start) for start in range(0, images, step)]

    def _may_part(self) -> bool:
        trace = self._trace
        if not trace.dynamic or any(len(trace.batch_axes(node)) > 1 for node in trace.outputs):
            return False

        def outputs(start: int, size: int) -> list[Tensor]:
            env = self._run(trace.nodes, trace.outputs, start, size)
            return [env[node] for node in trace.outputs]

        return self._samples.part(outputs)
