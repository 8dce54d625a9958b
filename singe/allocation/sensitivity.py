"""How much of each group a network can do without: how the loss rises as one group alone loses more and more."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from ..graph.groups import Group
from ..graph.nodes import ancestors
from ..graph.trace import Env, Trace, named_tensors
from ..models.batches import Batch, length
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
        batches: to measure the loss on.
        task: how the model is called and judged.
        compensator: refits readers before the loss is measured; None to leave them unchanged.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, batches: Sequence[Batch], task: Task, compensator: Compensator | None
    ) -> None:
        self._model, self._trace, self._batches, self._task = model, trace, batches, task
        self._compensator = compensator

    @torch.no_grad()
    def prices(self, group: Group, order: Tensor) -> Tensor:
        """The rise of the loss with each neuron removed, on the lower convex hull of the measurements.

        Args:
            group: the one that loses neurons.
            order: int64 [n], all its neurons, the first to be removed first.

        Returns:
            float64 [n], ascending, in the order of removal.
        """
        changed = self._depending(group)
        before = [self._before(batch, changed) for batch in self._batches]
        start = self._loss(self._model, before, changed)
        readers = [*self._compensator.equations(self._model, self._trace, group, {})] if self._compensator else []
        rises = {0: 0.0}
        for left in sorted({max(1, round(share * group.size)) for share in LEFT} - {group.size}, reverse=True):
            gone, pruned = order[: group.size - left], copy.deepcopy(self._model)
            mask(pruned, group.slices, gone)
            for weight, equations in readers:
                if self._compensator is not None and not isinstance(equations, str):
                    columns = torch.isin(group.slice(weight, 1).neuron, gone).nonzero().flatten()
                    known = equations.without(named_tensors(self._model)[weight], columns)
                    self._compensator.solve(pruned, weight, known)
            rises[len(gone)] = self._loss(pruned, before, changed) - start
        return marginal(rises, group.size)

    def _depending(self, group: Group) -> list[fx.Node]:
        """The operators that a removal reaches."""
        owned = {s.tensor for s in group.slices}
        needed, reached = ancestors(self._trace.outputs), dict[fx.Node, None]()
        for node in self._trace.nodes:
            if node in needed and any(i in reached or self._trace.state.get(i) in owned for i in node.all_input_nodes):
                reached[node] = None
        return list(reached)

    def _before(self, batch: Batch, changed: Sequence[fx.Node]) -> tuple[Batch, Env]:
        """A batch, and the values that no removal reaches."""
        graph, inputs = self._trace, self._task.inputs(batch)
        behind = set(changed)
        read = {i for node in changed for i in node.all_input_nodes} | set(graph.outputs)
        ends = [node for node in graph.nodes if node in read and node not in behind and not graph.is_size(node)]
        needed, env = ancestors(ends), graph.live(self._model) | graph.feed(inputs)
        graph.run([node for node in graph.nodes if node in needed], env, length(inputs), keep=ends)
        return batch, {node: env[node] for node in (*ends, *graph.inputs)}

    def _loss(self, model: nn.Module, before: Sequence[tuple[Batch, Env]], changed: Sequence[fx.Node]) -> float:
        losses, graph, live = list[Tensor](), self._trace, self._trace.live(model)
        for batch, known in before:
            env, count = live | known, length(batch)
            graph.run(changed, env, count, keep=graph.outputs)
            outputs = graph.unflatten([env[node] for node in graph.outputs], count)
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
