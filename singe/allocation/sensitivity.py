"""How much of each group a network can do without: how the loss rises as one group alone loses more and more."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from ..graph.groups import Group
from ..graph.nodes import ancestors
from ..graph.trace import Trace, named_tensors
from ..models.batches import Batch, joined, length
from ..models.copies import copy_of
from ..refit.activations import Activations
from ..refit.compensation import Compensator
from ..removal.surgery import mask
from ..task import Task

SAMPLES = 256
"""To measure the loss on, and to refit readers for that."""

LEFT = (0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.0)
"""The shares of a group at which the loss is measured; at least one neuron stays."""


class Sensitivity:
    """Measures how the loss changes with removals from one group at a time (Li et al. 2017, section 3.2).

    Args:
        model: unpruned, in eval mode.
        trace: of it.
        batches: to measure the loss on, of one length.
        task: how the model is called and judged.
        compensator: refits readers before the loss is measured; None to leave them unchanged.
        memory: bytes that activations may take, and copies of weights, each roughly.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        batches: Sequence[Batch],
        task: Task,
        compensator: Compensator | None,
        memory: int,
    ) -> None:
        self._model, self._trace, self._batches, self._task = model, trace, batches, task
        self._compensator, self._memory = compensator, memory
        inputs = joined([task.inputs(batch) for batch in batches])
        self._values = Activations(trace, inputs, length(batches[0]), memory // 2)

    @torch.no_grad()
    def prices(self, group: Group, order: Tensor) -> Tensor:
        """The rise of the loss with each neuron removed, on the lower convex hull of the measurements.

        Args:
            group: the one that loses neurons.
            order: int64 [n], all its neurons, the first to be removed first.

        Returns:
            float64 [n], ascending, in the order of removal.
        """
        unchanged = self._unchanged(group)
        start, rises = self._start, {0: 0.0}
        shared = self._others(group)
        lefts = sorted({max(1, round(share * group.size)) for share in LEFT} - {group.size}, reverse=True)
        copied = sum(t.nbytes for t in named_tensors(self._model).values()) - sum(t.nbytes for t in shared)
        at_once = max(1, self._memory // max(1, copied))
        for first in range(0, len(lefts), at_once):
            removals = [order[: group.size - left] for left in lefts[first : first + at_once]]
            for gone, network in zip(removals, self._pruned(group, removals, shared), strict=True):
                rises[len(gone)] = self._loss(network, unchanged) - start
        return marginal(rises, group.size)

    def _pruned(self, group: Group, removals: Sequence[Tensor], shared: Collection[Tensor]) -> list[nn.Module]:
        """A network without each of some sets of neurons, its readers refitted; the rest is the model's own."""
        networks = [copy_of(self._model, shared) for _ in removals]
        for network, gone in zip(networks, removals, strict=True):
            mask(network, group.slices, gone)
        if self._compensator is None:
            return networks
        tensors = named_tensors(self._model)
        for weight, equations in self._compensator.equations(self._model, self._trace, group):
            if isinstance(equations, str):
                continue
            whole, kernel = self._compensator.regressions(equations), equations.as_kernel(tensors[weight])
            for network, gone in zip(networks, removals, strict=True):
                columns = torch.isin(equations.neurons(group.read(weight)), gone).nonzero().flatten()
                less = whole.without(kernel, columns.to(kernel.device))
                self._compensator.solve(network, weight, equations, less)
        return networks

    @cached_property
    def _start(self) -> float:
        """The loss of the unpruned network."""
        return self._loss(self._model, [])

    def _others(self, group: Group) -> list[Tensor]:
        """The tensors that neither a removal from the group nor refitting its readers changes."""
        trace, tensors = self._trace, named_tensors(self._model)
        calls = [call for weight in group.readers for call in trace.calls(weight)]
        near = {i for call in calls for node in (call, *call.users) for i in node.all_input_nodes}
        changed = {s.tensor for s in group.slices} | {trace.state[node] for node in near if node in trace.state}
        own = {id(tensors[name]) for name in changed if name in tensors}  # tied ones go by several names
        return [tensor for tensor in tensors.values() if id(tensor) not in own]

    def _unchanged(self, group: Group) -> list[fx.Node]:
        """The values that no removal reaches, but something that one reaches reads."""
        graph = self._trace
        reached = ancestors(graph.outputs).intersection(graph.downstream({s.tensor for s in group.slices}))
        read = {i for node in reached for i in node.all_input_nodes} | set(graph.outputs)
        return [node for node in graph.nodes if node in read and node not in reached and not graph.is_size(node)]

    def _loss(self, network: nn.Module, unchanged: Sequence[fx.Node]) -> float:
        graph, losses = self._trace, list[Tensor]()
        values = self._values(network, [*graph.outputs, *unchanged], again=unchanged)
        for batch, found in zip(self._batches, values, strict=True):
            outputs = graph.unflatten(found[: len(graph.outputs)], length(batch))
            losses.append(self._task.judge(outputs, batch).double())
        return float(torch.stack(losses).mean())


def marginal(rises: Mapping[int, float], size: int) -> Tensor:
    """Slopes of the lower convex hull of a rising curve.

    Args:
        rises: number of neurons gone -> rise of the loss; 0 -> 0. A fall counts as 0, what is not finite as infinity.
        size: of the group.

    Returns:
        float64 [size], ascending, for each neuron removed; the slope at the end holds for those beyond.
    """
    hull: list[tuple[int, float]] = []
    for point in sorted((n, max(0.0, rise) if math.isfinite(rise) else math.inf) for n, rise in rises.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    slopes = [max(0.0, _slope(a, b)) for a, b in pairwise(hull) for _ in range(b[0] - a[0])]
    return torch.tensor(slopes + [slopes[-1]] * (size - len(slopes)), dtype=torch.float64)


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
