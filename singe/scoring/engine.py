"""The fast evaluation of criteria on one group (see ``passes`` for how)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import ops
from ..criteria import Criterion, LossChange, PathCriterion, PathRule, Random, WeightCriterion
from ..graph.groups import Group
from ..graph.layer import Layer
from ..graph.trace import Trace
from ..memory import Memory, limit
from ..models.batches import Batch, tensors
from ..models.precision import Precision, arithmetic
from ..quadrature import Nodes
from ..ranks import ALONE, Ranks
from ..task import Task
from .basis import Bases
from .jobs import Jobs, beside, whole_group
from .passes import LayerDelta, Passes, RowDelta

T = TypeVar("T")

ByRow = dict[str, Tensor]
"""A value for every row of every weight, [N] each."""

Sums = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""Weight, which of a neuron's rows -> that row [K] and its gradient so far [K, F], for K jobs."""


class Engine:
    """Scores the neurons of one group on one batch while they are removed one by one.

    Args:
        model: the module whose parameters are read live; removals are masked in it (see ``surgery.mask``).
        trace: of that model.
        group: of the neurons; its indices count in the model as it is.
        batch: on the model's device.
        task: how the model is called and judged; (x, y) batches and cross-entropy by default.
        memory: bytes that the activations of one pass may take, see :func:`singe.memory.limit`; at least one job on one
            image runs at a time.
        precision: the arithmetic of all passes; see ``precision.arithmetic``.
        ranks: that share the jobs, each with an engine for the same group of the same model on the same batch.
    """

    forgets_alone = False

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        group: Group,
        batch: Batch,
        task: Task = Task(),  # noqa: B008 - frozen
        memory: int | None = None,
        precision: Precision = "float32",
        ranks: Ranks = ALONE,
    ) -> None:
        self._group, self._precision, self._device = group, precision, tensors(batch)[0].device
        self._ranks = ranks
        self._memory = Memory(group.name, limit(memory, self._device), self._device)
        self._make = lambda: Passes(model, trace, group, batch, task, self.memory, precision)
        self._made: Passes | None = None
        self._bases = Bases()
        self._current_loss: float | None = None  # until it is asked for
        self._checked = False  # whether the loss was finite

    @property
    def memory(self) -> int:
        """What ``memory`` has come down to where the device had no room for that."""
        return self._memory.size

    @property
    def loss(self) -> float:
        """The loss on the batch with all removals so far.

        Raises:
            TypeError, ValueError: it is not a finite scalar.
        """
        if self._current_loss is None:
            self._current_loss = self._run(self._evaluate)
        return self._current_loss

    @property
    def chunk(self) -> int:
        """How many jobs that fade one neuron run at a time."""
        return self._run(lambda: self._passes.chunk)

    @property
    def parts(self) -> int:
        """The number of parts of the images, several if one job on all of them exceeds the memory."""
        return self._run(lambda: self._passes.parts)

    def scores(self, criterion: Criterion, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)] on the CPU: the criterion for each of ``neurons`` (int64; None: the whole group).

        Raises:
            TypeError, ValueError: a score or the loss is not finite, or the loss no scalar.
        """
        neurons = torch.arange(self._group.size) if neurons is None else neurons
        if not isinstance(criterion, (WeightCriterion, Random)):
            self._check_loss()
        scores = self._run(lambda: self._scores(criterion, neurons).cpu())
        if criterion.reads_loss:
            scores = self._ranks.sum(scores)  # here, since a rank short of memory restarts its jobs
        elif isinstance(criterion, Random):
            scores = self._ranks.from_first(scores)  # loaders may have drawn more on some ranks than on others
        if isinstance(criterion, LossChange):
            scores -= self.loss
        if not scores.isfinite().all():
            why = "the loss or its gradient overflows" if criterion.reads_loss else f"{criterion} gives others"
            raise ValueError(f"scores of {self._group.name} are not finite: {why}")
        return scores

    def fading(self, neuron: int, t: Tensor, p: float) -> Tensor:
        """float64 [len(t)] on the CPU: the gradient's norm of order p at points of the path that fades a neuron.

        Args:
            neuron: one that is still there.
            t: float64, points in (0, 1].
            p: 1, 2 or ``math.inf``. Norms of several rows add up.
        """
        return self._run(lambda: self._fading(neuron, t, p))

    def lasting(self, criterion: Criterion) -> bool:
        """Whether removals from the group leave the other scores as they are: those of some weight criteria alone.

        And not even those where a weight both writes and reads the group.
        """
        reads_itself = not set(self._group.readers).isdisjoint(self._group.writers)
        return isinstance(criterion, WeightCriterion) and criterion.lasting and not reads_itself

    def forget(self, neuron: int) -> None:
        """Zeroes a neuron in the caches, after ``surgery.mask`` has zeroed it in the model."""
        if self._made is not None:
            self._made.forget(neuron)
        self._current_loss = None

    def _check_loss(self) -> None:
        """Raises what :attr:`loss` raises, the first time."""
        if not self._checked:
            self._checked = math.isfinite(self.loss)

    @property
    def _passes(self) -> Passes:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _run(self, work: Callable[[], T]) -> T:
        """What passes come to; made anew and smaller where the device turns out to have no room for them."""

        def within_arithmetic() -> T:
            with self._arithmetic():
                return work()

        return self._memory.run(within_arithmetic, self._drop)

    def _drop(self) -> None:
        self._made, self._bases = None, Bases()

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(self._precision, self._device)

    def _evaluate(self) -> float:
        loss = float(self._passes.losses(whole_group(1.0))[0])
        if not math.isfinite(loss):
            raise ValueError(f"expected a finite loss on the batch, got {loss}")
        return loss

    # -- criteria --------------------------------------------------------------------------------------------

    def _scores(self, criterion: Criterion, neurons: Tensor) -> Tensor:
        """What this rank adds to the scores; all of them for criteria that need no jobs."""
        if isinstance(criterion, LossChange):
            return self._losses(neurons)
        if isinstance(criterion, Random):
            return torch.rand(len(neurons), dtype=torch.float64)
        if isinstance(criterion, WeightCriterion):
            return self._of_weights(criterion)[neurons]
        assert isinstance(criterion, PathCriterion), criterion
        rule = criterion.rule()
        norms = self._row_norms(criterion.p, neurons)
        if not rule.with_norm:
            norms = {weight: torch.ones_like(norm) for weight, norm in norms.items()}
        along = self._layer_path if rule.path == "layer" else self._neuron_path
        return self._per_neuron(along(rule, criterion.p, neurons, norms))[neurons]

    def _neuron_path(self, rule: PathRule, p: float, neurons: Tensor, norms: ByRow) -> ByRow:
        totals = {weight: torch.zeros_like(norm) for weight, norm in norms.items()}
        added = {weight: torch.zeros_like(norm, device="cpu") for weight, norm in norms.items()}

        def add(jobs: Jobs, sums: Sums, at: RowDelta) -> None:
            if self._passes.parts > 1 or self._is_shared(at.layer) or at.layer.transposed:
                return self._add_gradients(at, sums)
            weight, x = at.layer.weight, at.x
            if at.fixed and p == 2:
                x = self._bases.reduced(at.layer, x, self._group.size * len(rule.nodes[0]))
            ops.neuron_grad_norm(
                x, at.delta.to(x.dtype), beside(at.row, x), beside(jobs.weight, x),
                norms[weight], totals[weight], **asdict(at.layer.geometry),
                groups=at.layer.groups(at.x, self._passes.live), p=p,
            )  # fmt: skip

        for jobs in self._neuron_jobs(neurons, rule.nodes):
            sums: Sums = {}
            self._passes.row_deltas(jobs, partial(add, jobs, sums))
            for (weight, _), (row, gradient) in sums.items():
                norm = norms[weight][beside(row, gradient)] * torch.linalg.vector_norm(gradient, p, dim=1)
                # on the CPU, since sums into rows come out differently from call to call on a GPU
                added[weight].index_add_(0, row.cpu(), jobs.weight.cpu() * norm.cpu())
        return {weight: total + beside(added[weight], total) for weight, total in totals.items()}

    def _fading(self, neuron: int, t: Tensor, p: float) -> Tensor:
        norms = []
        for points in t.split(self._passes.chunk):
            sums: Sums = {}
            jobs = Jobs(torch.full((len(points),), neuron), points, torch.ones_like(points))
            self._passes.row_deltas(jobs, partial(self._add_gradients, sums=sums))
            by_row = [torch.linalg.vector_norm(gradient, p, dim=1).cpu() for _, gradient in sums.values()]
            norms.append(torch.stack(by_row).sum(0))
        return torch.cat(norms)

    def _is_shared(self, layer: Layer) -> bool:
        return sum(other.weight == layer.weight for other in self._passes.layers) > 1

    def _add_gradients(self, at: RowDelta, sums: Sums) -> None:
        """The gradient of a weight is summed over the places where it is used, and over parts of the images."""
        key = at.layer.weight, at.place
        own = at.layer.row_gradients(at.x, at.delta.to(at.x.dtype), at.row, self._passes.live).double()
        sums[key] = at.row, (sums[key][1] + own if key in sums else own)

    def _layer_path(self, rule: PathRule, p: float, neurons: Tensor, norms: ByRow) -> ByRow:
        totals = {weight: torch.zeros_like(norm) for weight, norm in norms.items()}
        summed: dict[str, Tensor] = {}

        def add_norms(weight: str, gradient: Tensor, node_weight: float) -> None:
            norm = torch.linalg.vector_norm(gradient, p, dim=1, dtype=torch.float64)
            totals[weight] += node_weight * norms[weight] * norm

        def add(jobs: Jobs, at: LayerDelta) -> None:
            weight = at.layer.weight
            for x, delta, node_weight in zip(at.x, at.delta, jobs.weight.tolist(), strict=True):
                gradient = at.layer.weight_gradient(x, delta.to(x.dtype), self._passes.live)  # [N, F], large
                if one_by_one:
                    summed[weight] = summed[weight] + gradient if weight in summed else gradient
                else:
                    add_norms(weight, gradient, node_weight)

        t, node_weight = rule.nodes
        one_by_one = self._passes.parts > 1 or any(map(self._is_shared, self._passes.layers))
        for chunk in self._chunks(len(t), 1 if one_by_one else self._passes.chunk_of_whole):
            jobs = Jobs(None, t[chunk], node_weight[chunk])
            self._passes.layer_deltas(jobs, partial(add, jobs))
            while summed:
                add_norms(*summed.popitem(), float(jobs.weight[0]))
        return totals

    def _losses(self, neurons: Tensor) -> Tensor:
        """float64 [len(neurons)]: the loss without each of those that are this rank's, else 0."""
        gone = (torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        losses = torch.zeros(len(neurons), dtype=torch.float64)
        own = [self._passes.losses(jobs).cpu() for jobs in self._neuron_jobs(neurons, gone)]
        losses[self._ranks.share(len(neurons))] = torch.cat([torch.empty(0), *own]).double()
        return losses

    def _of_weights(self, criterion: WeightCriterion) -> Tensor:
        """float64 [n]."""
        values: ByRow = {}
        for layer in self._passes.layers:
            own = layer.rows.flatten()
            rows = layer.folded_rows(self._passes.live, own)
            found = criterion.of_rows(rows)
            if not isinstance(found, Tensor) or found.shape != own.shape:
                what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"expected a value for each of {len(own)} rows from {type(criterion).__name__}.of_rows, got {what}"
                )
            values[layer.weight] = torch.zeros(int(own.max()) + 1, dtype=torch.float64)
            values[layer.weight][own] = found.double().cpu()
        return self._per_neuron(values)

    def _row_norms(self, p: float, neurons: Tensor) -> ByRow:
        return {layer.weight: layer.row_norms(self._passes.live, p, neurons) for layer in self._passes.layers}

    def _per_neuron(self, by_row: ByRow) -> Tensor:
        """float64 [n]: sums values per row [N] over each neuron's rows in all weights."""
        rows = {layer.weight: layer.rows for layer in self._passes.layers}
        return torch.stack([value.cpu()[rows[weight]].sum(1) for weight, value in by_row.items()]).sum(0)

    def _neuron_jobs(self, neurons: Tensor, nodes: Nodes) -> Iterator[Jobs]:
        """Every neuron at every node, as far as they are this rank's, in chunks that fit the memory."""
        t, weight = nodes
        for index in self._chunks(len(neurons) * len(t), self._passes.chunk):
            node = index % len(t)
            yield Jobs(neurons[index // len(t)], t[node], weight[node])

    def _chunks(self, jobs: int, size: int) -> Iterator[Tensor]:
        """The indices of this rank's jobs, ``size`` at a time."""
        own = torch.arange(jobs)[self._ranks.share(jobs)]
        yield from (chunk for chunk in own.split(size) if len(chunk))
