"""Feature relevance: what each channel contributes to the true class, propagated back from the outputs.

Relevance is 1 at the true class's logit (no softmax) and is passed back by the rules of ``relevance_rules``, layer by
layer, its total unchanged (Bach et al. 2015). The score of a channel follows Aketi et al. (2020): with r_c the mean of
R over positions and over the samples of class c, and acc_c the share of them that the network gets right,

    s = |mean over c of sigmoid(max(acc) / acc_c) r_c|, divided by the L2 norm of its layer's s.

A neuron that owns several channels (those of a residual stream, in several layers) scores the sum over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..criteria import Criterion, FeatureRelevance
from ..graph.groups import Group
from ..graph.layer import Layer, find_layers
from ..graph.nodes import described
from ..graph.suffix import cut
from ..graph.trace import Env, Trace
from ..memory import Memory
from ..models.batches import Batch, length, parts, tensors
from ..models.precision import wide
from ..task import Task
from .relevance_rules import Relevances, Step, rule_of


class Propagation:
    """Relevance from a network's logits back to some of its values.

    Args:
        trace: of the network.
        at: the nodes whose relevance is wanted.
        alpha: of the rule of layers with weights.

    Raises:
        ValueError: an operator between them and the logits has no rule, or the network does not return logits.
    """

    def __init__(self, trace: Trace, at: Sequence[fx.Node], alpha: float = 2) -> None:
        self._trace, self._alpha = trace, alpha
        self._cut = cut(trace, at)
        self._wanted = set(at)
        self._weights = {**trace.state, **trace.constants}
        self._nodes = [n for n in self._cut.nodes if not trace.is_size(n)]
        lost = [described(n) for n in self._nodes if rule_of(n, self._weights) is None]
        if lost:
            raise ValueError(f"expected operators that relevance has a rule for, got {', '.join(dict.fromkeys(lost))}")
        found = [tuple(n.meta["val"].shape) for n in trace.outputs]
        if len(found) != 1 or len(found[0]) != 2:
            raise ValueError(
                f"expected a network that puts out logits [B, classes] alone, got outputs of shape {found}"
            )
        self._logits = trace.outputs[0]

    def samples(self, memory: int) -> int:
        """How many samples pass at a time within ``memory`` bytes; the trace may take one number of them only."""
        kept = self._trace.nbytes([*self._nodes, *self._cut.roots])
        largest = max(self._trace.nbytes([n]) for n in (*self._cut.prefix, *self._nodes))
        return self._trace.samples_within(memory, kept + 8 * largest)

    @torch.no_grad()
    def __call__(
        self, live: Env, inputs: Any, start: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[fx.Node, Tensor]]:
        """The logits, and the relevance of each node in question in the shape of its value.

        Args:
            live: the network's parameters and buffers.
            inputs: what it is called with, for as many samples as the trace takes.
            start: logits [B, classes] -> their relevance.
        """
        steps: dict[fx.Node, Step] = {}
        live = {node: wide(value) for node, value in live.items()}
        env, batch = live | pytree.tree_map_only(Tensor, wide, self._trace.feed(inputs)), length(inputs)

        def size_or_value(node: fx.Node) -> Any:
            return self._trace.size(node.meta["val"], batch) if self._trace.is_size(node) else env[node]

        def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            known = {i: size_or_value(i) for i in node.all_input_nodes}
            activations = tuple(i for i in known if i not in self._weights and not self._trace.is_size(i))
            steps[node] = Step(node, known, activations, live, self._alpha)
            return steps[node].run({})

        self._trace.run(self._cut.prefix, env, batch, keep=[*self._cut.roots, *self._cut.boundary])
        self._trace.run(self._nodes, env, batch, keep=[self._logits], call=call)
        logits: Tensor = env[self._logits]
        return logits, self._back(steps, start(logits))

    def _back(self, steps: dict[fx.Node, Step], relevance: Tensor) -> dict[fx.Node, Tensor]:
        flowing: Relevances = {self._logits: relevance}
        for node in reversed(self._nodes):
            step = steps.pop(node)
            if node in flowing:
                rule = rule_of(node, self._weights)
                assert rule is not None
                here = flowing[node] if node in self._wanted else flowing.pop(node)
                for i, share in rule(step, here).items():
                    flowing[i] = pytree.tree_map(torch.add, flowing[i], share) if i in flowing else share
        return {node: flowing[node] for node in self._wanted if node in flowing}


@dataclass(eq=False)
class _Sums:
    """Sums over parts of the samples, class by class.

    Attributes:
        relevance: weight -> float64 [classes, channels]: means over positions, summed over samples.
        count, right: float64 [classes]: samples, and those classified correctly.
    """

    relevance: dict[str, Tensor]
    count: Tensor
    right: Tensor

    def channels(self, weight: str) -> Tensor:
        """float64 [channels]: their scores in one layer."""
        seen = self.count > 0
        accuracy = (self.right / self.count)[seen]
        relative = accuracy / accuracy.max() if accuracy.any() else torch.ones_like(accuracy)
        means = self.relevance[weight][seen] / self.count[seen, None]
        scores = (torch.sigmoid(1 / relative)[:, None] * means).mean(0).abs()
        return scores / (scores.norm() or 1.0)


def relevance_scores(
    model: nn.Module,
    trace: Trace,
    groups: Sequence[Group],
    batch: Batch,
    task: Task,
    criterion: FeatureRelevance,
    memory: Memory,
) -> list[Tensor]:
    """float64 [size] on the CPU for each group: how relevant its neurons are to the true classes of a batch.

    Args:
        model: whose weights are used; not run itself.
        trace: of it.
        groups: written by layers that are used in eval mode.
        batch: (x, y) with class indices y [B]; see :func:`labels`.
        task: how the model is called.
        criterion: the rule of layers with weights.
        memory: upper bound of the activations of a pass, met where samples can be split.

    Raises:
        TypeError, ValueError: no class indices, an operator without a rule, or scores that are not finite.
    """
    layers = [find_layers(trace, group) for group in groups]
    every = [layer for own in layers for layer in own]
    propagation = Propagation(trace, [layer.output for layer in every], criterion.alpha)

    def summed() -> _Sums:
        sums, live = _Sums({}, torch.empty(0), torch.empty(0)), trace.live(model)
        for part in parts(batch, propagation.samples(memory.size)):
            _gather(sums, every, *_started(propagation, live, task.inputs(part), labels(part)))
        return sums

    sums, found = memory.run(summed), []
    for group, own in zip(groups, layers, strict=True):
        rows = {layer.weight: layer.rows for layer in own}
        found.append(torch.stack([sums.channels(weight).cpu()[rows[weight]].sum(1) for weight in rows]).sum(0))
        if not found[-1].isfinite().all():
            raise ValueError(f"expected finite relevance, got some in {group.name} that is not")
    return found


def check_relevance(trace: Trace, groups: Sequence[Group], batch: Batch | None = None) -> None:
    """Raises ValueError or TypeError if relevance cannot be propagated to groups of a network, or from a batch's y."""
    Propagation(trace, [layer.output for group in groups for layer in find_layers(trace, group)])
    if batch is not None:
        labels(batch)


def labels(batch: Batch) -> Tensor:
    """The class indices y, int64 [B], of a batch (x, y).

    Raises:
        TypeError: the batch is no pair, or y holds no integers.
        ValueError: y is not one index for each sample.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise TypeError(f"expected batches (x, y) for feature relevance, got {type(batch).__name__}")
    y = batch[1]
    if y.is_floating_point() or y.dtype is torch.bool:
        raise TypeError(f"expected class indices y for feature relevance, got y of {y.dtype}")
    if y.dim() != 1:
        raise ValueError(f"expected a class index y for each sample for feature relevance, got y of {tuple(y.shape)}")
    return y.long()


def _started(
    propagation: Propagation, live: Env, inputs: Any, y: Tensor
) -> tuple[Tensor, Tensor, dict[fx.Node, Tensor]]:
    """The classes, the logits, and the relevance of the nodes in question, 1 at the true class's logit."""

    def start(logits: Tensor) -> Tensor:
        if not (int(y.min()) >= 0 and int(y.max()) < logits.shape[1]):
            raise ValueError(f"expected class indices y in [0, {logits.shape[1]}), got some in [{y.min()}, {y.max()}]")
        return torch.zeros_like(logits).scatter_(1, y[:, None], 1)

    return y, *propagation(live, inputs, start)


def _gather(sums: _Sums, layers: Sequence[Layer], y: Tensor, logits: Tensor, found: dict[fx.Node, Tensor]) -> None:
    classes = logits.shape[1]
    if not sums.count.numel():
        sums.count, sums.right = (torch.zeros(classes, dtype=torch.float64, device=y.device) for _ in range(2))
    of_class = F.one_hot(y, classes).double()
    sums.count += of_class.sum(0)
    sums.right += of_class[logits.argmax(1) == y].sum(0)
    for layer in {layer.output: layer for layer in layers}.values():
        channels = layer.output.meta["val"].shape[layer.axis]
        own = sums.relevance.setdefault(layer.weight, sums.count.new_zeros(classes, channels))
        if layer.output in found:  # else it does not lead to the outputs
            # a product, since sums into rows come out differently from call to call on a GPU
            own += of_class.T @ layer.channels_first(found[layer.output]).flatten(2).mean(2).double()


class RelevanceScorer:
    """Scores the neurons of one group while they are removed one by one, as an engine does.

    Args:
        model: pruned so far; removals are masked in it.
        trace: of its current state.
        group: of the neurons; its indices count in the model as it is.
        batch: (x, y) with class indices y.
        task: how the model is called and judged.
        memory: bytes that activations may take.
    """

    forgets_alone = False

    def __init__(self, model: nn.Module, trace: Trace, group: Group, batch: Batch, task: Task, memory: int) -> None:
        self._model, self._trace, self._group, self._batch, self._task = model, trace, group, batch, task
        self._memory = Memory(group.name, memory, tensors(batch)[0].device)

    @property
    def memory(self) -> int:
        """What ``memory`` has come down to where the device had no room for that."""
        return self._memory.size

    def scores(self, criterion: Criterion, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)] on the CPU: the relevance of neurons in the model as it is."""
        assert isinstance(criterion, FeatureRelevance), criterion
        (scores,) = relevance_scores(
            self._model, self._trace, [self._group], self._batch, self._task, criterion, self._memory
        )
        return scores if neurons is None else scores[neurons]

    def lasting(self, criterion: Criterion) -> bool:
        """Whether scores stay the same when others are removed."""
        return False

    def forget(self, neuron: int) -> None:
        """Nothing to do: weights are read again every time."""
