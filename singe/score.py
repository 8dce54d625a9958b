"""The score of one layer, without pruning anything."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from . import checks
from .criteria import Criterion, resolve
from .graph.analysis import find_groups
from .graph.groups import groups_of, in_layer_order
from .graph.trace import Forward, trace
from .models.isolation import plain_torch, preserved_random_state
from .models.patterns import first_name
from .models.precision import Precision, check_precision
from .models.weightnorm import without_weight_norms
from .models.wrappers import unwrapped
from .scoring.engine import DEFAULT_MEMORY
from .scoring.scores import scores_of
from .task import Loss, Task


def score(
    model: nn.Module,
    batch: Any,
    layer: str,
    *,
    criterion: str | Criterion = "integrated_gradient",
    loss: Loss | None = None,
    forward: Forward | None = None,
    memory: int = DEFAULT_MEMORY,
    precision: Precision = "float32",
) -> Tensor:
    """Relevance of every neuron of a layer; the smallest is the first to prune.

    Where the layer is coupled to others (a residual stream), a score is that of the whole coupled neuron: the sum over
    all its rows in all those layers. The batch norm after a layer counts as folded into it. The path fades the layer's
    output to zero; after an activation with f(0) != 0 (sigmoid) it therefore ends at f(0), whereas actual removal
    leaves nothing for the next layers to read.

    Args:
        model: not modified; scored in eval mode. If it is wrapped or compiled, the module inside is taken.
        batch: (x, y) with x [B, ...] and y [B, ...]; see ``forward``.
        layer: module name of a convolution, linear layer or batch norm, as in ``model.named_modules()``.
        criterion: a name or an object of ``singe.criteria``.
        loss: (outputs, batch) -> scalar; mean cross-entropy by default.
        forward: (model, batch) -> outputs, for a model not called as ``model(x)``; a batch is then any nested tensors.
        memory: bytes that one pass's activations may take, as far as images can pass in parts.
        precision: of the passes that compute scores: "float32", the model's own dtype without TF32; "tf32" on CUDA; or
            "bfloat16", autocast.

    Returns:
        float64 [n] on the CPU: one value per neuron, ordered by its first row in ``layer``; frozen neurons too.

    Raises:
        TypeError, ValueError: bad input; see the message.
    """
    model, chosen = unwrapped(model), resolve(criterion)
    checks.integer("memory", memory, 1)
    device = checks.sound_model(model)
    check_precision(precision, model, device)
    with plain_torch(device), preserved_random_state():
        task = Task(forward, loss)
        here = checks.batch_of(batch, device, task)
        work = without_weight_norms(checks.working_copy(model))
        checks.runs(work, here, task)
        graph = trace(work, task.inputs(here), task.call)
        layer = first_name(work, layer)
        groups = groups_of(layer, find_groups(graph))
        scores = scores_of(work, graph, groups, here, task, chosen, memory, precision)
    return in_layer_order(layer, list(zip(groups, scores, strict=True)))
