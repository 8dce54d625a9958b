"""The fast evaluation of criteria on one group (see ``passes`` for how)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn

from . import ops
from .batches import Batch, tensors
from .criteria import Criterion, LossChange, Magnitude, PathCriterion, PathRule, Random
from .graph.groups import Group
from .graph.layer import Layer
from .graph.trace import Trace
from .jobs import Jobs, whole_group
from .passes import LayerDelta, Passes, RowDelta
from .precision import Precision, arithmetic
from .quadrature import Nodes
from .task import Task

DEFAULT_MEMORY = 1 << 30

ByRow = dict[Layer, Tensor]
"""A value for every row of every layer, [N] each."""


class Engine:
    """Scores the neurons of one group on one batch while they are removed one by one.

    Args:
        model: the module whose parameters are read live; removals are masked in it (see ``surgery.mask``).
        trace: of that model.
        group: which neurons; its indices count in the model as it is.
        batch: on the model's device.
        task: how the model is called and judged; (x, y) batches and cross-entropy by default.
        memory: bytes that the activations of one pass may take; at least one job on one image runs at a time.
        precision: the arithmetic of all passes; see ``precision.arithmetic``.

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
        precision: Precision = "float32",
    ) -> None:
        self._group, self._precision, self._device = group, precision, tensors(batch)[0].device
        with self._arithmetic():
            self._passes = Passes(model, trace, group, batch, task, memory, precision)
            self._current_loss: float | None = self._evaluate()

    @property
    def loss(self) -> float:
        """The loss on the batch with all removals so far."""
        if self._current_loss is None:
            with self._arithmetic():
                self._current_loss = self._evaluate()
        return self._current_loss

    @property
    def chunk(self) -> int:
        """How many jobs that fade one neuron run at a time."""
        with self._arithmetic():
            return self._passes.chunk

    @property
    def parts(self) -> int:
        """Into how many parts the images are divided, because one job on all of them exceeds the memory."""
        return self._passes.parts

    def scores(self, criterion: Criterion, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)] on the CPU: the criterion for each of ``neurons`` (int64; None: the whole group).

        Raises:
            ValueError: a score is not finite.
        """
        neurons = torch.arange(self._group.size) if neurons is None else neurons
        with self._arithmetic():
            scores = self._scores(criterion, neurons).cpu()
        if not scores.isfinite().all():
            raise ValueError(f"scores of {self._group.name} are not finite: the loss or its gradient overflows")
        return scores

    def forget(self, neuron: int) -> None:
        """Zeroes a neuron in the caches, after ``surgery.mask`` has zeroed it in the model."""
        with self._arithmetic():
            self._passes.forget(neuron)
        self._current_loss = None

    def _arithmetic(self) -> AbstractContextManager[None]:
        return arithmetic(self._precision, self._device)

    def _evaluate(self) -> float:
        loss = float(self._passes.losses(whole_group(1.0))[0])
        if not math.isfinite(loss):
            raise ValueError(f"expected a finite loss on the batch, got {loss}")
        return loss

    # -- criteria --------------------------------------------------------------------------------------------

    def _scores(self, criterion: Criterion, neurons: Tensor) -> Tensor:
        if isinstance(criterion, LossChange):
            return self._loss_changes(neurons)
        if isinstance(criterion, Random):
            return torch.rand(len(neurons), dtype=torch.float64)
        if isinstance(criterion, Magnitude):
            norms = {layer: layer.row_norms(self._passes.live, criterion.p, neurons) for layer in self._passes.layers}
            return self._per_neuron(norms)[neurons]
        assert isinstance(criterion, PathCriterion), criterion
        rule = criterion.rule()
        norms = {layer: self._norms(layer, rule, criterion.p, neurons) for layer in self._passes.layers}
        along = self._layer_path if rule.path == "layer" else self._neuron_path
        return self._per_neuron(along(rule, criterion.p, neurons, norms))[neurons]

    def _neuron_path(self, rule: PathRule, p: float, neurons: Tensor, norms: ByRow) -> ByRow:
        totals = {layer: torch.zeros_like(norm) for layer, norm in norms.items()}

        def add(jobs: Jobs, at: RowDelta) -> None:
            ops.neuron_grad_norm(
                at.x, at.delta.to(at.x.dtype), at.row.to(at.x.device), jobs.weight.to(at.x.device),
                norms[at.layer], totals[at.layer], **asdict(at.layer.geometry),
                groups=at.layer.groups(at.x, self._passes.live), p=p,
            )  # fmt: skip

        for jobs in self._neuron_jobs(neurons, rule.nodes):
            if self._passes.parts == 1:
                self._passes.row_deltas(jobs, partial(add, jobs))
            else:
                self._add_in_parts(jobs, p, norms, totals)
        return totals

    def _add_in_parts(self, jobs: Jobs, p: float, norms: ByRow, totals: ByRow) -> None:
        """The norm of the gradient of one job, summed over parts of the images."""
        gradients: dict[tuple[Layer, int], Tensor] = {}

        def add(at: RowDelta) -> None:
            key = at.layer, int(at.row)
            own = at.layer.row_gradient(at.x, at.delta[0].to(at.x.dtype), key[1], self._passes.live).double()
            gradients[key] = gradients[key] + own if key in gradients else own

        self._passes.row_deltas(jobs, add)
        for (layer, row), gradient in gradients.items():
            totals[layer][row] += jobs.weight[0] * norms[layer][row] * torch.linalg.vector_norm(gradient, p)

    def _layer_path(self, rule: PathRule, p: float, neurons: Tensor, norms: ByRow) -> ByRow:
        totals = {layer: torch.zeros_like(norm) for layer, norm in norms.items()}
        in_parts: dict[Layer, Tensor] = {}

        def add_norms(layer: Layer, gradient: Tensor, node_weight: float) -> None:
            norm = torch.linalg.vector_norm(gradient, p, dim=1, dtype=torch.float64)
            totals[layer] += node_weight * norms[layer] * norm

        def add(jobs: Jobs, at: LayerDelta) -> None:
            for x, delta, node_weight in zip(at.x, at.delta, jobs.weight.tolist(), strict=True):
                gradient = at.layer.weight_gradient(x, delta.to(x.dtype), self._passes.live)  # [N, F], large
                if self._passes.parts == 1:
                    add_norms(at.layer, gradient, node_weight)
                else:
                    in_parts[at.layer] = in_parts[at.layer] + gradient if at.layer in in_parts else gradient

        t, weight = rule.nodes
        for chunk in torch.arange(len(t)).split(self._passes.chunk_of_whole):
            jobs = Jobs(None, t[chunk], weight[chunk])
            self._passes.layer_deltas(jobs, partial(add, jobs))
            while in_parts:
                add_norms(*in_parts.popitem(), float(jobs.weight[0]))
        return totals

    def _loss_changes(self, neurons: Tensor) -> Tensor:
        gone = (torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        losses = [self._passes.losses(jobs).cpu() for jobs in self._neuron_jobs(neurons, gone)]
        return torch.cat([torch.empty(0), *losses]).double() - self.loss

    def _norms(self, layer: Layer, rule: PathRule, p: float, neurons: Tensor) -> Tensor:
        norms = layer.row_norms(self._passes.live, p, neurons)
        return norms if rule.with_norm else torch.ones_like(norms)

    def _per_neuron(self, by_row: ByRow) -> Tensor:
        """float64 [n]: sums values per row [N] over each neuron's rows in all layers."""
        return torch.stack([value.cpu()[layer.rows].sum(1) for layer, value in by_row.items()]).sum(0)

    def _neuron_jobs(self, neurons: Tensor, nodes: Nodes) -> Iterator[Jobs]:
        """Every neuron at every node, in chunks that fit the memory."""
        t, weight = nodes
        for index in torch.arange(len(neurons) * len(t)).split(self._passes.chunk):
            node = index % len(t)
            yield Jobs(neurons[index // len(t)], t[node], weight[node])
