"""The scores of one layer or of all of them, without pruning anything."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor, nn

from . import checks
from .criteria import Criterion, resolve
from .graph.analysis import find_groups
from .graph.groups import Group, groups_of, in_layer_order, module_of
from .graph.trace import Forward, Trace, trace
from .memory import Memory, limit
from .models.batches import Batch
from .models.isolation import plain_torch, preserved_random_state
from .models.names import first_name
from .models.precision import Precision, check_precision
from .models.weightnorm import without_weight_norms
from .models.wrappers import unwrapped
from .scoring.admission import check_scorable
from .scoring.scores import scores_of, unscorable
from .task import Loss, Task

log = logging.getLogger("singe")


@overload
def score(
    model: nn.Module,
    batch: Any,
    layer: str,
    *,
    criterion: str | Criterion = ...,
    loss: Loss | None = ...,
    forward: Forward | None = ...,
    memory: int | None = ...,
    precision: Precision = ...,
) -> Tensor: ...


@overload
def score(
    model: nn.Module,
    batch: Any,
    layer: None = ...,
    *,
    criterion: str | Criterion = ...,
    loss: Loss | None = ...,
    forward: Forward | None = ...,
    memory: int | None = ...,
    precision: Precision = ...,
) -> dict[str, Tensor]: ...


def score(
    model: nn.Module,
    batch: Any,
    layer: str | None = None,
    *,
    criterion: str | Criterion = "integrated_gradient",
    loss: Loss | None = None,
    forward: Forward | None = None,
    memory: int | None = None,
    precision: Precision = "float32",
) -> Tensor | dict[str, Tensor]:
    """Relevance of every neuron of a layer, or of all layers; the smallest of a layer is the first to prune.

    Where the layer is coupled to others (a residual stream), a score is that of the whole coupled neuron: the sum over
    all its rows in all those layers. The batch norm after a layer counts as folded into it. The path fades the layer's
    output to zero; after an activation with f(0) != 0 (sigmoid) it therefore ends at f(0), whereas actual removal
    leaves nothing for the next layers to read.

    Args:
        model: not modified; scored in eval mode. If it is wrapped or compiled, the module inside is taken.
        batch: (x, y) with x [B, ...] and y [B, ...]; see ``forward``.
        layer: module name of a convolution, linear layer or batch norm, as in ``model.named_modules()``; None for all
            convolutions and linear layers that the criterion can score.
        criterion: a name or an object of ``singe.criteria``.
        loss: (outputs, batch) -> scalar; mean cross-entropy by default.
        forward: (model, batch) -> outputs, for a model not called as ``model(x)``; a batch is then any nested tensors.
        memory: upper bound, in bytes, of the activations of a pass, met where images can be split; 1 GiB by
            default, on a GPU a sixteenth of its memory if that is more.
        precision: of the passes that compute scores: "float32", the model's own dtype without TF32; "tf32" on CUDA; or
            "bfloat16", autocast.

    Returns:
        float64 [n] on the CPU: one value per neuron, ordered by its first row in ``layer``; frozen neurons too.
        Without ``layer``, module name -> that of each layer.

    Raises:
        TypeError, ValueError: bad input; see the message.
    """
    model, chosen = unwrapped(model), resolve(criterion)
    device = checks.sound_model(model)
    room = Memory("scoring", limit(memory, device), device)
    check_precision(precision, model, device)
    with plain_torch(device), preserved_random_state():
        task = Task(forward, loss)
        here = checks.batch_of(batch, device, task)
        work = without_weight_norms(checks.working_copy(model))
        checks.runs(work, here, task)
        graph = trace(work, task.inputs(here), task.call)
        check_scorable(work, graph, here, task, chosen)
        every = find_groups(graph)
        layers = [first_name(work, layer)] if layer is not None else _scorable(graph, every, chosen, here)
        parts = {name: groups_of(name, every) for name in layers}
        groups = [g for g in every if any(g in own for own in parts.values())]
        found = dict(zip(groups, scores_of(work, graph, groups, here, task, chosen, room, precision), strict=True))
        scores = {name: in_layer_order(name, [(g, found[g]) for g in own]) for name, own in parts.items()}
    return scores if layer is None else scores[layers[0]]


def _scorable(graph: Trace, groups: Sequence[Group], criterion: Criterion, batch: Batch) -> list[str]:
    """The convolutions and linear layers all of whose neurons a criterion can score."""
    blind = unscorable(graph, groups, criterion, batch)
    for name, reason in blind.items():
        log.info("%s is not scored: %s", name, reason)
    wholly = {module_of(weight): True for group in groups for weight in group.writers}
    wholly |= {module_of(weight): False for group in groups if group.name in blind for weight in group.writers}
    return [name for name, scorable in wholly.items() if scorable]
