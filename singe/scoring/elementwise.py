"""Criteria on single weights: the norms of one number are its absolute value, so that p does not matter.

The path is that of the layer, t W for all its weights at once, t in (0, 1]; biases and batch norms stay as they are.
Batch norms are not folded in: folding would scale a weight by the factor by which it divides its gradient, so that
products of the two are the same, and magnitudes or gradients alone are those of the weight in the model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..criteria import Criterion, FadingCriterion, Magnitude, PathCriterion, Random, resolve
from ..graph.budget import is_shortage
from ..graph.suffix import cut
from ..graph.trace import Env, Trace
from ..models.batches import Batch, head, length, parts
from ..models.numerics import close
from ..models.precision import Precision, arithmetic
from ..quadrature import Nodes
from ..ranks import ALONE, Ranks
from ..task import Task
from .stacking import Stacking

log = logging.getLogger("singe")


def resolve_elementwise(criterion: str | Criterion) -> Criterion:
    """The criterion of a name, on the path of the layer where it has a path; or the object itself.

    Raises:
        ValueError: unknown name, a criterion that cannot score single weights, or an object on another path.
        TypeError: neither a name nor a criterion.
    """
    found = resolve(criterion)
    if not isinstance(found, (Magnitude, PathCriterion, Random)):
        raise ValueError(f"expected a criterion that scores single weights with structured=False, got {criterion!r}")
    if isinstance(found, FadingCriterion) and found.path != "layer":
        if not isinstance(criterion, str):
            raise ValueError(f"expected path='layer' with structured=False, single weights have no other, got {found}")
        return replace(found, path="layer")
    return found


class WeightScorer:
    """Scores every single weight of one parameter on one batch.

    Args:
        model: in eval mode, read as it is.
        trace: of that model.
        parameter: its qualified name, the first of several.
        batch: on the model's device.
        task: how the model is called and judged.
        memory: bytes that the activations of one pass may take, as far as images can pass in parts.
        precision: of the passes.
        ranks: that share the nodes of the path.

    Attributes:
        memory: the same, lowered where the device had no room for that.
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
        self.memory: int = memory
        self._ranks = ranks
        self._name, self._weight = parameter, model.get_parameter(parameter).detach()
        self._make = lambda: Gradients(model, trace, parameter, batch, task, self.memory)
        self._precision = precision

    def scores(self, criterion: Criterion) -> Tensor:
        """float32 or float64, of the parameter's shape and on its device; smallest for the least relevant.

        Raises:
            ValueError: a score is not finite.
        """
        if isinstance(criterion, Random):
            return torch.rand(self._weight.shape).to(self._weight.device)
        magnitude = self._weight.abs().to(torch.promote_types(self._weight.dtype, torch.float32))
        if isinstance(criterion, Magnitude):
            return magnitude
        assert isinstance(criterion, PathCriterion), criterion
        rule = criterion.rule()
        own = self._ranks.share(len(rule.nodes[0]))
        scores = self._ranks.sum(self._summed((rule.nodes[0][own], rule.nodes[1][own])))
        if rule.with_norm:
            scores *= magnitude
        if not scores.isfinite().all():
            raise ValueError(f"scores of {self._name} are not finite: the loss or its gradient overflows")
        return scores

    def _summed(self, nodes: Nodes) -> Tensor:
        """The sum over the nodes of weight * |dL/d(tW)|, with passes made smaller where there is no room for them."""
        while True:
            try:
                with arithmetic(self._precision, self._weight.device):
                    return self._make().summed(nodes)
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error) or self.memory < 2:
                    raise
            self.memory //= 2
            log.warning("%s: out of memory, passes may take %d bytes from now on", self._name, self.memory)
            if self._weight.is_cuda:
                torch.cuda.empty_cache()


class Gradients:
    """The loss's gradient at one parameter while it fades; the network before it runs once if all images fit.

    Args:
        model, trace, parameter, batch, task, memory: as of :class:`WeightScorer`.
    """

    def __init__(self, model: nn.Module, trace: Trace, parameter: str, batch: Batch, task: Task, memory: int) -> None:
        self._trace, self._task, self._batch, self._name = trace, task, batch, parameter
        self._live, self._stacking = trace.live(model), Stacking(trace)
        self._places = [node for node, name in trace.state.items() if name == parameter]
        self._weight = self._live[self._places[0]]
        self._suffix = cut(trace, self._places)
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
                return torch.autograd.grad(self._loss(self._outputs(faded, 0)), faded, materialize_grads=True)[0]
        for index, seed in enumerate(self._seeds(faded)):
            with torch.enable_grad():
                outputs = self._outputs(faded, index)
                ends = [(out, own) for out, own in zip(outputs, seed, strict=True) if out.requires_grad]
                values, at_values = zip(*ends, strict=True)
                total += torch.autograd.grad(values, faded, at_values, materialize_grads=True)[0]
        return total

    def _seeds(self, faded: Tensor) -> list[tuple[Tensor, ...]]:
        """The loss's gradient at the model's outputs, for every part of the images."""
        nodes = self._trace.outputs
        with torch.no_grad():
            each = [self._outputs(faded, index) for index in range(len(self._sizes))]
        joined = [self._stacking.join(*pair) for pair in zip(nodes, zip(*each, strict=True), strict=True)]
        with torch.enable_grad():
            leaves = [out.detach().requires_grad_(out.is_floating_point() or out.is_complex()) for out in joined]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            # a loss may write into its arguments, but not into a leaf
            loss = self._loss([leaf.clone() for leaf in leaves])
            found = iter(torch.autograd.grad(loss, wanted, materialize_grads=True))
        seeds = [next(found) if leaf.requires_grad else leaf for leaf in leaves]
        split = [self._stacking.split(node, seed, self._sizes) for node, seed in zip(nodes, seeds, strict=True)]
        return list(zip(*split, strict=True))

    def _loss(self, outputs: Sequence[Tensor]) -> Tensor:
        with torch.autocast(self._weight.device.type, enabled=False):
            loss = self._task.judge(self._trace.unflatten(outputs, length(self._batch)), self._batch)
        if not loss.requires_grad:
            raise ValueError("expected a loss that depends smoothly on the outputs, got one without a gradient")
        return loss

    def _outputs(self, faded: Tensor, part: int) -> list[Tensor]:
        """The model's outputs for a part of the images, in the dtype and memory format of the model itself."""
        before = self._before if len(self._sizes) == 1 else self._prefix(sum(self._sizes[:part]), self._sizes[part])
        env = self._live | before | dict.fromkeys(self._places, faded)
        self._trace.run(self._suffix.nodes, env, self._sizes[part], keep=self._trace.outputs)
        values = [(env[node].to(node.meta["val"].dtype).contiguous(), node in before) for node in self._trace.outputs]
        return [value.clone() if cached else value for value, cached in values]

    @cached_property
    def _before(self) -> Env:
        return self._prefix(0, length(self._batch))

    def _prefix(self, start: int, size: int) -> Env:
        """The values that the suffix reads, for some of the images."""
        fed = self._trace.feed(self._task.inputs(self._batch))
        env = self._live | {node: value[start : start + size] for node, value in fed.items()}
        with torch.no_grad():
            self._trace.run(self._suffix.prefix, env, size, keep=self._suffix.boundary)
        return {node: env[node] for node in self._suffix.boundary}

    def _divided(self, memory: int) -> list[int]:
        """The numbers of images in parts that pass one after the other."""
        images = length(self._batch)
        sizes = [self._trace.nbytes([node], images) for node in self._suffix.nodes]
        # values stay for the backward pass, gradients are short-lived
        needed = sum(sizes) + 3 * max(sizes, default=0) + self._trace.nbytes(self._suffix.boundary, images)
        if needed <= memory:
            return [images]
        if not samples_are_independent(self._trace, self._live, self._task.inputs(self._batch)):
            log.warning("%s: samples cannot be passed in parts, a pass takes %d bytes", self._name, needed)
            return [images]
        step = max(1, images * memory // needed)
        return [min(step, images - start) for start in range(0, images, step)]


@torch.no_grad()
def samples_are_independent(trace: Trace, live: Env, inputs: Batch) -> bool:
    """Whether two samples together give the same outputs as each alone."""
    if not trace.dynamic or any(len(trace.batch_axes(node)) > 1 for node in trace.outputs):
        return False

    def outputs(samples: Batch) -> list[Tensor]:
        env = live | trace.feed(samples)
        trace.run(trace.nodes, env, length(samples), keep=trace.outputs)
        return [env[node] for node in trace.outputs]

    pair, stacking = head(inputs, 2), Stacking(trace)
    try:
        together, alone = outputs(pair), [outputs(half) for half in parts(pair, 1)]
    except (RuntimeError, ValueError, IndexError) as error:
        log.debug("passing images in parts failed: %s", error)
        return False
    joined = [stacking.join(*both) for both in zip(trace.outputs, zip(*alone, strict=True), strict=True)]
    return all(close(*values) for values in zip(joined, together, strict=True))
