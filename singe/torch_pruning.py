"""Scores for Torch-Pruning: its pruners decide how much each layer loses, ours which channels are least relevant."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .criteria import Criterion, resolve
from .graph.analysis import find_groups
from .graph.groups import Group, Slice
from .graph.trace import Forward, Trace, named_tensors, trace
from .memory import Memory, limit
from .models.batches import Batch, tensors
from .models.isolation import plain_torch, preserved_random_state
from .models.precision import Precision, check_precision
from .models.wrappers import unwrapped
from .scoring.admission import check_scorable
from .scoring.scores import scores_of, unscorable
from .task import Loss, Task

log = logging.getLogger("singe")


class SingeImportance:
    """The relevance of channels, as an importance of Torch-Pruning.

    ::

        importance = singe.SingeImportance(model, batch)
        pruner = tp.pruner.MagnitudePruner(
            model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[model.fc]
        )
        pruner.step()

    A channel's score is that of the whole neuron it belongs to in the current network, including the rows of other
    layers that it is coupled to: what :func:`singe.score` returns, not normalised, so that channels of different layers
    can be ranked together. It is computed again whenever a pruner asks, after every step on the smaller network.

    Torch-Pruning accepts it as one of its own: ``isinstance(importance, tp.importance.Importance)``.

    Attributes:
        batch: what scores are computed on; it may be replaced between steps.
    """

    batch: Any

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        criterion: str | Criterion = "integrated_gradient",
        loss: Loss | None = None,
        forward: Forward | None = None,
        memory: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Computes nothing yet.

        Args:
            model: the one that the pruner gets, which it makes smaller in place; only read here. Scored in eval mode.
            batch: (x, y) with x [B, ...] and y [B, ...]; see ``forward``.
            criterion: a name or an object of ``singe.criteria``.
            loss: (outputs, batch) -> scalar; mean cross-entropy by default.
            forward: (model, batch) -> outputs, for a model not called as ``model(x)``; a batch is then any nested
                tensors.
            memory: upper bound, in bytes, of the activations of a pass, met where images can be split; 1 GiB by
                default, on a GPU a sixteenth of its memory if that is more.
            precision: of the passes that compute scores; see :func:`singe.score`.

        Raises:
            ImportError: Torch-Pruning is missing.
            TypeError, ValueError: bad input; see the message.
        """
        try:
            from torch_pruning.pruner.importance import Importance
        except ImportError as error:
            raise ImportError("SingeImportance is for Torch-Pruning: pip install torch-pruning") from error
        Importance.register(type(self))
        self._model, self._criterion = unwrapped(model), resolve(criterion)
        self._precision = precision
        self._task = Task(forward, loss)
        self._device = checks.sound_model(self._model)
        self._memory = Memory("scoring", limit(memory, self._device), self._device)
        check_precision(precision, self._model, self._device)
        checks.batch_of(batch, self._device, self._task)
        self.batch = batch
        self._traced: tuple[list[torch.Size], Trace, list[Group]] | None = None

    def __call__(self, group: Any) -> Tensor | None:
        """The scores of the channels of a ``tp.Group``.

        Args:
            group: as a pruner makes it of the model's layers.

        Returns:
            float64 [number of channels of the group's root] on the CPU; or None, so that the pruner leaves the group
            whole, if the weights of some channels cannot be followed or scored, as a warning then says.

        Raises:
            TypeError, ValueError: the group is of another model, or the batch cannot be scored.
        """
        with plain_torch(self._device), preserved_random_state(), torch.enable_grad():
            return self._scores(group)

    def _scores(self, group: Any) -> Tensor | None:
        batch = checks.batch_of(self.batch, self._device, self._task)
        work = checks.working_copy(self._model)
        graph, groups = self._look(work, batch)
        writers = self._writers(group)
        own = [g for g in groups if any(_written(g, name) for name, _, _ in writers)]
        blind = unscorable(graph, own, self._criterion, batch) if own else {}
        own = [g for g in own if g.name not in blind]
        scores = scores_of(work, graph, own, batch, self._task, self._criterion, self._memory, self._precision)
        scored = list(zip(own, scores, strict=True))
        of_root = dict.fromkeys(group[0].idxs, math.nan)
        for name, channels, roots in writers:
            by_channel = _by_channel(name, scored)
            for channel, root in zip(channels, roots, strict=True):
                if root is not None and math.isnan(of_root[root]):
                    of_root[root] = by_channel.get(channel, math.nan)
        if any(map(math.isnan, of_root.values())):
            reason = "; ".join(blind.values()) or "what its layers write cannot be followed"
            log.warning("no scores for the channels of %s, which stay: %s", ", ".join(w[0] for w in writers), reason)
            return None
        return torch.tensor([*of_root.values()], dtype=torch.float64)

    def _look(self, work: nn.Module, batch: Batch) -> tuple[Trace, list[Group]]:
        """The graph and the groups of the network, which is exported again if shapes have changed."""
        shapes = [tensor.shape for tensor in (*named_tensors(work).values(), *tensors(batch))]
        if self._traced is None or self._traced[0] != shapes:
            checks.runs(work, batch, self._task)
            graph = trace(work, self._task.inputs(batch), self._task.call)
            check_scorable(work, graph, batch, self._task, self._criterion)
            self._traced = shapes, graph, find_groups(graph)
        return self._traced[1:]

    def _writers(self, group: Any) -> list[tuple[str, Sequence[int], Sequence[int | None]]]:
        """The modules that write a group: their names, which of their channels, and the root's channels they match."""
        names = {module: name for name, module in self._model.named_modules()}
        found = []
        for item in group:
            module = item.dep.target.module
            if not group._DG.is_out_channel_pruning_fn(item.dep.handler) or getattr(module, "weight", None) is None:
                continue
            if module not in names:
                raise ValueError(
                    f"expected a group of the {type(self._model).__name__} given, got one of another model"
                )
            found.append((names[module], item.idxs, item.root_idxs))
        return found


def _by_channel(module: str, scored: Sequence[tuple[Group, Tensor]]) -> dict[int, float]:
    """Channel of a module -> score of the neuron that it belongs to."""
    return {
        channel: float(scores[neuron])
        for group, scores in scored
        for written in _written(group, module)
        for channel, neuron in enumerate(written.neuron.tolist())
        if neuron >= 0
    }


def _written(group: Group, module: str) -> list[Slice]:
    """The slices of a module's weight that write the group."""
    return [s for s in group.slices if s.role == "writes" and s.tensor == f"{module}.weight"]
