"""Passes over the operators that depend on one group: prefix once, jobs stacked on the batch axis, suffix only.

A job is one point of one fading path: everything a neuron owns on the writing side is scaled by t. As scaling is
linear, a layer's output z under a job is a scaled copy of the cached z; only operators that depend on z run again, K
jobs at a time, and the loss is differentiated only down to z. In eval mode samples do not affect each other, so the
stack is exact; a check per group falls back to one job at a time where it is not. Where one job exceeds the memory, its
images pass in parts, each twice: first for the outputs, on which the loss depends, then for the gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..graph.groups import Group
from ..graph.layer import Layer
from ..graph.riders import Rider
from ..graph.trace import Env, Trace
from ..models.batches import Batch, length, tensors
from ..models.precision import Precision, prefers_channels_last
from ..task import Task
from .backward import gradients
from .budget import Budget
from .incremental import Incremental
from .jobs import Jobs, beside, spread, whole_group
from .judging import Judge
from .prefix import Prefix
from .samples import Samples
from .stacking import Stacking
from .stretch import Stretch

log = logging.getLogger("singe")


@dataclass(frozen=True)
class RowDelta:
    """The loss's gradient at the outputs that jobs fade: one row of one layer for each job.

    Attributes:
        layer: the layer.
        place: which of the rows that each neuron owns in it.
        x: its input, [B, C, ...] for all jobs or [K*B, C, ...].
        fixed: whether it is the same in every pass.
        row: int64 [K].
        delta: [K, B, *positions].
    """

    layer: Layer
    place: int
    x: Tensor
    fixed: bool
    row: Tensor
    delta: Tensor


@dataclass(frozen=True)
class LayerDelta:
    """The loss's gradient at all outputs of a layer.

    Attributes:
        layer: the layer.
        x: its input for each job, K times [B, C, ...].
        delta: likewise, K times [B, N, ...].
    """

    layer: Layer
    x: Sequence[Tensor]
    delta: Sequence[Tensor]


@dataclass(frozen=True)
class _Part:
    """Some of the batch's images, and the values that the prefix computes for them once.

    Attributes:
        size: how many.
        values: of the suffix's boundary, its roots and the inputs of these.
        front: the front of the suffix, where it has one.
    """

    size: int
    values: Env
    front: Incremental | None


@dataclass(frozen=True)
class _Pass:
    """The values of a pass of K jobs.

    Attributes:
        front: what they passed first, if not the layers themselves.
        faded: faded values, with gradient history.
        inputs: the layers' inputs, by the node of their output.
        outputs: the model's.
    """

    front: Incremental | None
    faded: dict[fx.Node, Tensor]
    inputs: dict[fx.Node, Tensor]
    outputs: list[Tensor]


class Passes:
    """Runs jobs on one group and one batch while neurons are removed one by one.

    Args:
        model: the module whose parameters are read live; removals are masked in it (see ``surgery.mask``).
        trace: of that model.
        group: of the neurons; its indices count in the model as it is.
        batch: on the model's device.
        task: how the model is called and judged.
        memory: bytes that the activations of one pass may take; at least one job on one image runs at a time.
        precision: see ``precision.arithmetic``, inside which everything here is to be called.

    Attributes:
        layers: the group's writers, in execution order.
        parts: the number of parts of the images.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        group: Group,
        batch: Batch,
        task: Task,
        memory: int,
        precision: Precision,
    ) -> None:
        self._trace, self._group, self._size = trace, group, length(batch)
        self._device = tensors(batch)[0].device
        self._stacking = Stacking(trace)
        self._prefix = Prefix(model, trace, group, task.inputs(batch), prefers_channels_last(precision, self._device))
        self._down = self._prefix.down
        self._judge = Judge(trace, self._stacking, task, batch)
        self._samples = Samples(group.name, trace, self._stacking, coarse=precision != "float32")
        self.layers = self._down.layers
        self._gone: list[int] = []
        self._budget = Budget(trace, self._down, self._size, group.size, memory, self._device)
        self._sizes = self._divide()
        self.parts = len(self._sizes)

    # -- requests --------------------------------------------------------------------------------------------

    def losses(self, jobs: Jobs) -> Tensor:
        """[K]: each job's loss."""
        self._catch_up()
        with torch.no_grad():
            return self._judge.losses(self._outputs(jobs), len(jobs))

    def row_deltas(self, jobs: Jobs, receive: Callable[[RowDelta], None]) -> None:
        """Hands over the gradient at every row that the jobs' neurons own, for each part of the images."""

        def hand_over(done: _Pass, deltas: dict[fx.Node, Tensor]) -> None:
            if done.front is not None:
                (layer,), output = self.layers, done.front.output
                delta = done.front.delta(jobs, done.faded[output].detach(), deltas[output])
                row = jobs.rows(layer.rows)[:, 0]
                return receive(RowDelta(layer, 0, self._input(layer, done), self._is_fixed(layer), row, delta))
            every = torch.arange(len(jobs))
            for layer in self.layers:
                x, fixed = self._input(layer, done), self._is_fixed(layer)
                delta = layer.channels_first(deltas[layer.output]).unflatten(0, (len(jobs), -1))
                for place, row in enumerate(jobs.rows(layer.rows).unbind(1)):
                    receive(RowDelta(layer, place, x, fixed, row, delta[every, :, row]))

        self._differentiate(jobs, hand_over)

    def layer_deltas(self, jobs: Jobs, receive: Callable[[LayerDelta], None]) -> None:
        """Hands over the gradient at every layer's output under jobs that fade the whole group, likewise."""

        def hand_over(done: _Pass, deltas: dict[fx.Node, Tensor]) -> None:
            for layer in self.layers:
                x, delta = self._input(layer, done), layer.channels_first(deltas[layer.output])
                xs = [x] * len(jobs) if layer.output in self._down.suffix.roots else x.chunk(len(jobs))
                receive(LayerDelta(layer, xs, delta.chunk(len(jobs))))

        self._differentiate(jobs, hand_over)

    @property
    def live(self) -> Env:
        """The current values of the model's parameters and buffers, by node."""
        self._catch_up()
        return self._prefix.live

    def forget(self, neuron: int) -> None:
        """Zeroes a neuron in the caches, after ``surgery.mask`` has zeroed it in the model."""
        self._gone.append(neuron)  # many may be removed before the next request

    def _catch_up(self) -> None:
        if not self._gone:
            return
        gone, self._gone = self._gone, []
        self._prefix.refresh()
        if self.parts > 1:
            return  # the parts are recomputed for every pass
        if (front := self._all.front) is not None:
            front.remove(gone)
        for root in self._down.suffix.roots:
            layer, z = self._down.by_output[root], self._all.values[root]
            z.index_fill_(layer.axis, layer.rows[gone].flatten().to(z.device), 0)

    @cached_property
    def chunk(self) -> int:
        """How many jobs that fade one neuron run at a time: what fits the memory, one where they do not stack."""
        return self._at_once(self._down.behind)

    @cached_property
    def chunk_of_whole(self) -> int:
        """How many jobs that fade the whole group run at a time."""
        return self._at_once(self._down.whole)

    # -- one pass over K jobs --------------------------------------------------------------------------------

    def _outputs(self, jobs: Jobs) -> list[Tensor]:
        """The model's outputs for K jobs on all images."""
        parts = [self._forward(jobs, self._part(index)).outputs for index in range(self.parts)]
        return self._stacking.join_outputs(parts)

    def _differentiate(self, jobs: Jobs, receive: Callable[[_Pass, dict[fx.Node, Tensor]], None]) -> None:
        """For each part of the images: a forward pass and the gradient of the summed losses at every faded value."""
        self._catch_up()
        seeds: Sequence[Sequence[Tensor] | None] = self._seeds(jobs) if self.parts > 1 else [None]

        def one(part: _Part, seed: Sequence[Tensor] | None) -> None:  # so that nothing is kept while the next part runs
            with torch.enable_grad():
                done = self._forward(jobs, part)
                ends = done.outputs if seed is not None else [self._judge.summed(done.outputs, len(jobs))]
                deltas = gradients(ends, seed, list(done.faded.values()))
            receive(done, dict(zip(done.faded, deltas, strict=True)))

        for index, seed in enumerate(seeds):
            one(self._part(index), seed)

    def _seeds(self, jobs: Jobs) -> list[tuple[Tensor, ...]]:
        """The gradient of the summed losses at the model's outputs, for every part of the images."""
        with torch.no_grad():
            outputs = self._outputs(jobs)
        return self._stacking.split_outputs(self._judge.gradients(outputs, len(jobs)), self._sizes)

    def _forward(self, jobs: Jobs, part: _Part) -> _Pass:
        faded: dict[fx.Node, Tensor] = {}
        env: Env = dict(self._prefix.live)
        front = part.front if jobs.neuron is not None and bool((jobs.t >= 0).all()) else None
        on = self._down.whole if front is None else self._down.behind
        env |= {node: part.values[node] for node in on.constants}
        env |= {node: self._stacking.stack(node, part.values[node], len(jobs)) for node in on.stacked}
        if front is None:
            faded |= {root: self._fade_root(self._down.by_output[root], part, jobs) for root in self._down.suffix.roots}
        else:
            faded[front.output] = front.fade(jobs)
        env |= {node: value.requires_grad_(torch.is_grad_enabled()) for node, value in faded.items()}

        def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = self._evaluate(node, args, kwargs, on, len(jobs))
            if node in self._down.by_output:
                layer = self._down.by_output[node]
                scale = jobs.scale(layer.rows, value.shape[layer.axis], value)
                value = faded[node] = value * spread(scale, value, layer.axis)
            elif node in self._down.riders:
                value = faded[node] = value + self._fading(self._down.riders[node], value, jobs)
            return value

        inputs = [layer.x for layer in self.layers]
        keep = [*self._trace.outputs, *inputs]
        self._trace.run(on.nodes, env, len(jobs) * part.size, keep=keep, call=call)
        seen = {
            layer.output: part.values[layer.x] if layer.output in self._down.suffix.roots else env[layer.x].detach()
            for layer in self.layers
        }
        return _Pass(front, faded, seen, [env[n] for n in self._trace.outputs])

    def _evaluate(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], on: Stretch, jobs: int) -> Any:
        """A node's own value, before anything fades."""
        if node in self._prefix.folded:
            args = (args[0], *self._prefix.folded[node], *args[3:])
        return on.evaluate(node, args, kwargs, jobs)

    def _fade_root(self, layer: Layer, part: _Part, jobs: Jobs) -> Tensor:
        z = part.values[layer.output]
        if jobs.neuron is None:
            scales = jobs.scale(layer.rows, z.shape[layer.axis], z).unbind()
            shape = [1] * z.dim()
            shape[layer.axis] = -1
            return torch.cat([z * scale.view(shape) for scale in scales])
        return ops.fade_neurons(z, beside(jobs.rows(layer.rows), z), beside(jobs.t, z), axis=layer.axis)

    def _fading(self, rider: Rider, value: Tensor, jobs: Jobs) -> Tensor:
        """The addend that turns a x + shift into a x + t shift for the neurons that fade, for all jobs and samples."""
        shift = rider.shift(self._prefix.live)
        neuron = beside(rider.neuron, shift)
        column = (-1, *[1] * neuron.dim())
        fades = neuron >= 0 if jobs.neuron is None else neuron == beside(jobs.neuron, shift).view(column)
        missing = fades * (beside(jobs.t, shift).to(shift.dtype) - 1).view(column) * shift  # [K, ...]
        axis = next(iter(self._trace.batch_axes(rider.node)), 0)
        missing = missing.movedim(0, axis).flatten(axis, axis + 1)
        return missing.repeat_interleave(value.shape[axis] // missing.shape[axis], axis)

    def _input(self, layer: Layer, done: _Pass) -> Tensor:
        return layer.padded(layer.channels_first(done.inputs[layer.output]))

    def _is_fixed(self, layer: Layer) -> bool:
        return self.parts == 1 and layer.output in self._down.suffix.roots

    # -- the images ------------------------------------------------------------------------------------------

    def _part(self, index: int) -> _Part:
        """All images, computed once; or some of them, recomputed every time."""
        return self._all if self.parts == 1 else self._images(sum(self._sizes[:index]), self._sizes[index])

    @cached_property
    def _all(self) -> _Part:
        part = self._images(0, self._size)
        front, (layer, *_) = self._down.front, self.layers
        if front is None:
            return part
        weight, bias = self._prefix.weights(front.reader)
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            values = {node: part.values[node] for node in (*self._down.suffix.boundary, layer.output)}
            incremental = Incremental(front, layer, values, weight, bias, self._budget.keeps_contributions)
        return _Part(part.size, part.values, incremental)

    def _images(self, start: int, size: int) -> _Part:
        """The prefix's values for some of the images, computed a few at a time where memory is short."""
        step = self._budget.prefix()
        if step < size and not self._independent:
            log.warning("%s: samples cannot be passed in parts, what lies before exceeds memory", self._group.name)
            step = size
        steps = [self._prefix.values(start + i, min(step, size - i)) for i in range(0, size, step)]
        return _Part(size, {n: self._stacking.join(n, [values[n] for values in steps]) for n in self._down.kept}, None)

    # -- what may run at a time ------------------------------------------------------------------------------

    def _at_once(self, on: Stretch) -> int:
        if self.parts > 1:
            return 1
        fit = self._budget.jobs(on, self._down.front is not None)
        return fit if fit == 1 or self._stackable else 1

    @cached_property
    def _stackable(self) -> bool:
        if not self._trace.dynamic:
            log.warning("%s: the model's batch size is fixed, jobs run one by one", self._group.name)
            return False
        if not self._samples.stack(self._outputs):
            log.warning("%s: samples see each other or do not lie along axis 0, jobs run one by one", self._group.name)
            return False
        return True

    def _divide(self) -> list[int]:
        """The numbers of images in parts that run one by one: one part if a job fits or samples affect each other."""
        sizes = self._budget.parts()
        if len(sizes) > 1 and not self._independent:
            bytes_ = self._budget.needed
            log.warning("%s: samples cannot be passed in parts, a pass takes %d bytes", self._group.name, bytes_)
            return [self._size]
        return sizes

    @cached_property
    def _independent(self) -> bool:
        """Whether two images together give the same outputs as each alone."""
        several_axes = any(len(self._trace.batch_axes(node)) > 1 for node in (*self._down.kept, *self._trace.outputs))
        if not self._trace.dynamic or several_axes:
            return False
        whole = whole_group(1.0)
        return self._samples.part(
            lambda start, size: self._forward(whole, _Part(size, self._prefix.values(start, size), None)).outputs
        )
