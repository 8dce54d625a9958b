"""The fast evaluation of criteria on one group: prefix once, jobs stacked on the batch axis, suffix only.

A job is one point of one fading path: all that a neuron owns on the writing side is scaled by t. Because scaling is
linear, a layer's output z under a job is a scaled copy of the cached z; only what depends on z runs again, K jobs at a
time, and the loss is differentiated down to z only. In eval mode samples do not see each other, so the stack is exact;
a check per group falls back to one job at a time where it is not.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import ops
from .batches import Batch, length
from .criteria import Criterion, LossChange, Magnitude, PathCriterion, PathRule, Random
from .graph import batchnorm
from .graph.groups import Group
from .graph.layer import Layer, find_layers, is_affine
from .graph.suffix import cut
from .graph.trace import Env, Trace, evaluate
from .numerics import close
from .quadrature import Nodes, Quadrature
from .task import Task

log = logging.getLogger("singe")

DEFAULT_MEMORY = 1 << 30


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
        faded = self.rows(rows).to(like.device)
        return scale.scatter_(1, faded, self.t.to(like.device)[:, None].expand_as(faded)).to(like.dtype)


@dataclass(frozen=True)
class _Rider:
    """A batch norm that no layer absorbs; its shift fades with the neurons that pass through it."""

    node: fx.Node
    rows: Tensor


@dataclass(frozen=True)
class _Pass:
    """What K jobs left behind: faded values (with gradient history), the layers' inputs, and a loss per job."""

    faded: dict[fx.Node, Tensor]
    inputs: dict[fx.Node, Tensor]
    outputs: list[Tensor]
    losses: Tensor


class Engine:
    """Scores the neurons of one group on one batch while they are removed one by one.

    Args:
        model: the module whose parameters are read live; removals are masked in it (see ``surgery.mask``).
        trace: of that model.
        group: which neurons; its indices count in the model as it is.
        batch: on the model's device.
        task: how the model is called and judged; (x, y) batches and cross-entropy by default.
        memory: bytes that the activations of one pass may take; at least one job runs at a time.

    Raises:
        TypeError, ValueError: the loss does not return a finite scalar for this batch.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        group: Group,
        batch: Batch,
        task: Task = Task(),  # noqa: B008 - frozen
        memory: int = DEFAULT_MEMORY,
    ) -> None:
        self._trace, self._group, self._batch = trace, group, batch
        self._task, self._size = task, length(batch)
        self._live = trace.live(model)
        self._layers = find_layers(trace, group)
        self._by_output = {layer.output: layer for layer in self._layers}
        self._suffix = cut(trace, self._by_output)
        self._foldable = [n for n in self._suffix.nodes if is_affine(n) and batchnorm.folds(n, self._live)]
        self._absorbed = {batchnorm.following(n) for n in self._foldable}
        self._folded: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._fold(self._foldable)
        self._riders = {rider.node: rider for rider in self._find_riders()}
        self._cache = self._run_prefix()
        self._memory = memory
        self._current_loss: float | None = self._evaluate()

    @property
    def loss(self) -> float:
        """The loss on the batch with all removals so far."""
        if self._current_loss is None:
            self._current_loss = self._evaluate()
        return self._current_loss

    # -- scores ----------------------------------------------------------------------------------------------

    def scores(self, criterion: Criterion, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)] on the CPU: the criterion for each of ``neurons`` (int64; None: the whole group).

        Raises:
            ValueError: a score is not finite.
        """
        neurons = torch.arange(self._group.size) if neurons is None else neurons
        scores = self._scores(criterion, neurons).cpu()
        if not scores.isfinite().all():
            raise ValueError(f"scores of {self._group.name} are not finite: the loss or its gradient overflows")
        return scores

    def _scores(self, criterion: Criterion, neurons: Tensor) -> Tensor:
        if isinstance(criterion, LossChange):
            return self._loss_changes(neurons)
        if isinstance(criterion, Random):
            return torch.rand(len(neurons), dtype=torch.float64)
        if isinstance(criterion, Magnitude):
            norms = {layer: layer.row_norms(self._live, criterion.p, neurons) for layer in self._layers}
            return self._per_neuron(norms)[neurons]
        assert isinstance(criterion, PathCriterion), criterion
        rule = criterion.rule()
        if rule.path == "layer":
            return self._layer_path(rule, criterion.p, neurons)[neurons]
        return self._neuron_path(rule, criterion.p, neurons)[neurons]

    def signed_integral(self, quadrature: Quadrature, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)]: the integral of <dL/d(t theta), theta> dt = L minus L without the neuron.

        theta is all that the neuron owns on the writing side: weights, biases and batch norm shifts.
        """
        neurons = torch.arange(self._group.size) if neurons is None else neurons
        total = torch.zeros(self._group.size, dtype=torch.float64)
        for jobs in self._neuron_jobs(neurons, quadrature.dt()):
            done, deltas = self._differentiate(jobs)
            for node, value in done.faded.items():
                rows, inner = self._theta_gradient(node, value.detach(), deltas[node], jobs)
                share = inner.double().cpu().gather(1, jobs.rows(rows)).sum(1)
                total.index_add_(0, jobs.neuron, jobs.weight * share)  # type: ignore[arg-type]
        return total[neurons]

    def forget(self, neuron: int) -> None:
        """Zeroes a neuron in the caches, after ``surgery.mask`` has zeroed it in the model."""
        for root in self._suffix.roots:
            layer = self._by_output[root]
            z = self._cache[root]
            z.index_fill_(layer.axis, layer.rows[neuron].to(z.device), 0)
        owned = {s.tensor for s in self._group.slices}
        self._fold([c for c in self._foldable if any(self._trace.state.get(i) in owned for i in c.all_input_nodes)])
        self._current_loss = None

    # -- the three kinds of pass -----------------------------------------------------------------------------

    def _neuron_path(self, rule: PathRule, p: float, neurons: Tensor) -> Tensor:
        norms = {layer: self._norms(layer, rule, p, neurons) for layer in self._layers}
        totals = {layer: torch.zeros_like(norm) for layer, norm in norms.items()}
        for jobs in self._neuron_jobs(neurons, rule.nodes):
            done, deltas = self._differentiate(jobs)
            for layer in self._layers:
                x = layer.padded(layer.channels_first(done.inputs[layer.output]))
                delta = layer.channels_first(deltas[layer.output]).unflatten(0, (len(jobs), -1))  # [K, B, N, ...]
                every = torch.arange(len(jobs), device=x.device)
                for row in jobs.rows(layer.rows).to(x.device).unbind(1):
                    ops.neuron_grad_norm(
                        x, delta[every, :, row], row, jobs.weight.to(x.device), norms[layer], totals[layer],
                        **asdict(layer.geometry), groups=layer.groups(x, self._live), p=p,
                    )  # fmt: skip
        return self._per_neuron(totals)

    def _layer_path(self, rule: PathRule, p: float, neurons: Tensor) -> Tensor:
        norms = {layer: self._norms(layer, rule, p, neurons) for layer in self._layers}
        totals = {layer: torch.zeros_like(norm) for layer, norm in norms.items()}
        t, weight = rule.nodes
        for chunk in torch.arange(len(t)).split(self.chunk):
            jobs = Jobs(None, t[chunk], weight[chunk])
            done, deltas = self._differentiate(jobs)
            for layer in self._layers:
                x = layer.channels_first(done.inputs[layer.output])
                delta = layer.channels_first(deltas[layer.output])
                shared = layer.output in self._suffix.roots
                xs = [x] * len(jobs) if shared else x.chunk(len(jobs))
                weights = jobs.weight.to(x.device).split(1)
                for own, d, w in zip(xs, delta.chunk(len(jobs)), weights, strict=True):
                    grad = layer.weight_gradient(own, d, self._live)[None]  # [1, N, F]: one node at a time, it is large
                    totals[layer] += ops.path_scores(grad, norms[layer], w, p)
        return self._per_neuron(totals)

    def _loss_changes(self, neurons: Tensor) -> Tensor:
        gone = (torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        with torch.no_grad():
            losses = [self._forward(jobs).losses.cpu() for jobs in self._neuron_jobs(neurons, gone)]
        return torch.cat([torch.empty(0), *losses]).double() - self.loss

    def _norms(self, layer: Layer, rule: PathRule, p: float, neurons: Tensor) -> Tensor:
        norms = layer.row_norms(self._live, p, neurons)
        return norms if rule.with_norm else torch.ones_like(norms)

    def _per_neuron(self, by_row: dict[Layer, Tensor]) -> Tensor:
        """float64 [n]: sums values per row [N] over each neuron's rows in all layers."""
        return torch.stack([value.cpu()[layer.rows].sum(1) for layer, value in by_row.items()]).sum(0)

    def _neuron_jobs(self, neurons: Tensor, nodes: Nodes) -> Iterator[Jobs]:
        """Every neuron at every node, in chunks that fit the memory."""
        t, weight = nodes
        for index in torch.arange(len(neurons) * len(t)).split(self.chunk):
            node = index % len(t)
            yield Jobs(neurons[index // len(t)], t[node], weight[node])

    # -- one pass over K jobs --------------------------------------------------------------------------------

    def _differentiate(self, jobs: Jobs) -> tuple[_Pass, dict[fx.Node, Tensor]]:
        """A forward pass and the gradient of the summed losses at every faded value."""
        with torch.enable_grad():
            done = self._forward(jobs)
            if not done.losses.requires_grad:
                raise ValueError("expected a loss that depends smoothly on the outputs, got one without a gradient")
            values = list(done.faded.values())
            grads = torch.autograd.grad(done.losses.sum(), values, materialize_grads=True)
        return done, dict(zip(done.faded, grads, strict=True))

    def _forward(self, jobs: Jobs) -> _Pass:
        faded: dict[fx.Node, Tensor] = {}
        env: Env = dict(self._live)
        env |= {node: self._stack(node, len(jobs)) for node in self._suffix.boundary}
        for root in self._suffix.roots:
            z = self._fade_root(self._by_output[root], jobs)
            env[root] = faded[root] = z.requires_grad_(torch.is_grad_enabled())

        def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if node in self._folded:
                args = (args[0], *self._folded[node], *args[3:])
            value = args[0] if node in self._absorbed else evaluate(node, args, kwargs)
            if node in self._by_output:
                layer = self._by_output[node]
                value = faded[node] = _times(value, jobs.scale(layer.rows, value.shape[layer.axis], value), layer.axis)
            elif node in self._riders:
                value = faded[node] = value + self._fading(self._riders[node], value, jobs)
            return value

        inputs = [layer.x for layer in self._layers]
        batch = len(jobs) * self._size
        self._trace.run(self._suffix.nodes, env, batch, keep=[*self._trace.outputs, *inputs], call=call)
        seen = {
            layer.output: self._cache[layer.x] if layer.output in self._suffix.roots else env[layer.x].detach()
            for layer in self._layers
        }
        values = [env[n] for n in self._trace.outputs]
        return _Pass(faded, seen, values, self._losses(values, len(jobs)))

    def _stack(self, node: fx.Node, count: int) -> Tensor:
        """``count`` copies of a cached value along its batch axis; values without one are shared."""
        value, axes = self._cache[node], self._trace.batch_axes(node)
        if not axes or count == 1:
            return value
        if len(axes) > 1:
            raise ValueError(f"{node} depends on the batch along several axes")
        return torch.cat([value] * count, dim=axes[0])

    def _unstack(self, node: fx.Node, value: Tensor, count: int) -> Sequence[Tensor]:
        """Undoes ``_stack``."""
        axes = self._trace.batch_axes(node)
        if not axes:
            return [value] * count
        each = value.shape[axes[0]] // count
        # narrow, not chunk: a loss may write into a view of its own
        return [value.narrow(axes[0], k * each, each) for k in range(count)]

    def _fade_root(self, layer: Layer, jobs: Jobs) -> Tensor:
        z = self._cache[layer.output]
        first = layer.channels_first(z)
        if jobs.neuron is None:
            stacked = torch.cat([first] * len(jobs))
            faded = _times(stacked, jobs.scale(layer.rows, first.shape[1], first), 1)
        else:
            faded = ops.fade_neurons(first, jobs.rows(layer.rows).to(z.device), jobs.t.to(z.device))
        return layer.restored(faded, z)

    def _fading(self, rider: _Rider, value: Tensor, jobs: Jobs) -> Tensor:
        """What turns a x + shift into a x + t shift, broadcast to ``value``."""
        shift = batchnorm.affine(rider.node, self._live).shift
        missing = (jobs.scale(rider.rows, len(shift), shift) - 1) * shift  # [K, N]
        return _spread(missing, value, 1)

    def _theta_gradient(self, node: fx.Node, value: Tensor, delta: Tensor, jobs: Jobs) -> tuple[Tensor, Tensor]:
        """A node's rows per neuron, and <dL/d(t theta), theta> of every channel there, [K, N]."""
        t = jobs.t.to(value)
        if node in self._riders:
            rider = self._riders[node]
            summed = delta.unflatten(0, (len(jobs), -1)).transpose(1, 2).flatten(2).sum(2)
            return rider.rows, summed * batchnorm.affine(node, self._live).shift
        layer = self._by_output[node]
        # the faded output is t theta x
        product = layer.channels_first(delta * value).unflatten(0, (len(jobs), -1))
        return layer.rows, product.transpose(1, 2).flatten(2).sum(2) / t[:, None]

    def _losses(self, outputs: list[Tensor], count: int) -> Tensor:
        parts = [self._unstack(*pair, count) for pair in zip(self._trace.outputs, outputs, strict=True)]
        jobs = [self._trace.unflatten(part, self._size) for part in zip(*parts, strict=True)]
        return torch.stack([self._task.judge(outputs, self._batch) for outputs in jobs])

    def _evaluate(self) -> float:
        with torch.no_grad():
            loss = float(self._forward(_whole_group(1.0)).losses[0])
        if not math.isfinite(loss):
            raise ValueError(f"expected a finite loss on the batch, got {loss}")
        return loss

    def _fold(self, calls: Iterable[fx.Node]) -> None:
        """Folds the batch norms behind these layers of the suffix into them, as they stand now."""
        self._folded |= {call: batchnorm.folded(call, self._live) for call in calls}

    # -- set-up ----------------------------------------------------------------------------------------------

    def _find_riders(self) -> Iterator[_Rider]:
        owned = {s.tensor for s in self._group.slices if s.dim == 0}
        for node in self._suffix.nodes:
            if batchnorm.is_batch_norm(node) and node not in self._by_output:
                tensor = batchnorm.owned_tensor(self._trace, node)
                if tensor in owned:
                    yield _Rider(node, self._group.rows(tensor))

    def _run_prefix(self) -> Env:
        inputs = [layer.x for layer in self._layers if layer.output in self._suffix.roots]
        keep = [*self._suffix.boundary, *self._suffix.roots, *inputs]
        env: Env = self._live | self._trace.feed(self._task.inputs(self._batch))
        with torch.no_grad():
            self._trace.run(self._suffix.prefix, env, self._size, keep=keep)
        return {node: env[node] for node in keep}

    @cached_property
    def chunk(self) -> int:
        """How many jobs run at a time: what fits the memory, one where two that differ do not stack."""
        needed = [*self._suffix.nodes, *self._suffix.boundary, *self._suffix.roots]
        # every value is kept for the backward pass, and its gradient stands beside it
        fit = max(1, self._memory // (2 * self._trace.nbytes(needed, self._size)))
        if fit == 1:
            return 1
        if not self._trace.dynamic:
            log.warning("%s: the model's batch size is fixed, jobs run one by one", self._group.name)
            return 1
        if not self._stacks():
            log.warning("%s: samples see each other or do not lie along axis 0, jobs run one by one", self._group.name)
            return 1
        return fit

    def _stacks(self) -> bool:
        with torch.no_grad():
            alone = [self._forward(_whole_group(t)).outputs for t in (1.0, 0.5)]
            try:
                stacked = self._forward(_whole_group(1.0, 0.5)).outputs
            except Exception as error:  # the model or the loss may not take more samples at once
                log.debug("%s: stacking two jobs failed: %s", self._group.name, error)
                return False
        values = zip(self._trace.outputs, stacked, *alone, strict=True)
        return all(
            close(part, expected)
            for node, both, *each in values
            for part, expected in zip(self._unstack(node, both, 2), each, strict=True)
        )


def _whole_group(*t: float) -> Jobs:
    """One job for each t, which fades the whole group."""
    points = torch.tensor(t, dtype=torch.float64)
    return Jobs(None, points, torch.ones_like(points))


def _times(value: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Value [K*B, ...] times scale [K, channels] along the channel axis."""
    return value * _spread(scale, value, axis)


def _spread(per_job: Tensor, value: Tensor, axis: int) -> Tensor:
    """[K, channels] so that it broadcasts to value [K*B, ..., channels, ...]."""
    repeated = per_job.repeat_interleave(len(value) // len(per_job), dim=0)
    shape = [1] * value.dim()
    shape[0], shape[axis] = repeated.shape
    return repeated.view(shape)
