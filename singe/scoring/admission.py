"""Whether a network and its loss can be scored: what is computed by its graph has to be what its own code computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..criteria import Criterion
from ..graph.trace import Trace
from ..models.batches import Batch, head
from ..models.isolation import all_trained
from ..models.outputs import Form, leaves
from ..task import Task, differentiable
from .own_gradients import check_own_gradients


def check_scorable(
    model: nn.Module, graph: Trace, batch: Batch, task: Task, criterion: Criterion, *, judged: bool = False
) -> None:
    """Raises ValueError if a criterion would score something else than the network.

    Args:
        model: a working copy, in eval mode.
        graph: of the model.
        batch: on its device.
        task: how the model is called and judged.
        criterion: that decides what is removed.
        judged: whether the loss decides, too.
    """
    few = batch if graph.dynamic else head(batch, graph.example_batch)
    if judged or criterion.reads_loss:
        check_loss(model, few, task, gradients=criterion.takes_gradients)
    if criterion.takes_gradients:
        check_own_gradients(model, graph, few, task)


def check_loss(model: nn.Module, batch: Batch, task: Task, *, gradients: bool) -> None:
    """Raises ValueError if the loss sees more of the model than its outputs: scores would not.

    The loss of the same outputs must not depend on what the model has seen in between, such as what hooks keep of it.

    Args:
        model: a working copy.
        batch: on its device.
        task: how the model is called and judged.
        gradients: whether the loss has to have a gradient at some weight, too.
    """
    with torch.no_grad():
        try:
            batch, outputs, first = _judged(model, head(batch, 16), task)
        except (RuntimeError, ValueError, IndexError):  # the model or the loss takes whole batches only
            batch, outputs, first = _judged(model, batch, task)
        again = float(task.judge(outputs, batch))
        task.outputs(model, pytree.tree_map(lambda t: t[:1].expand_as(t).clone(), batch))
        after = float(task.judge(outputs, batch))
    if first == again and not math.isclose(first, after, rel_tol=1e-3) and math.isfinite(first):
        raise ValueError(
            "expected a loss of the model's outputs and the batch alone, but it depends on what else the model has "
            "computed (such as what a hook has kept); return that from forward=, among the outputs"
        )
    with torch.no_grad():
        rebuilt = float(task.judge(_made_anew(outputs), batch))
    if first == again and not math.isclose(first, rebuilt, rel_tol=1e-3) and math.isfinite(first):
        raise ValueError(
            f"expected outputs whose loss stays the same if they are made anew of what they hold, but a new "
            f"{type(outputs).__name__} has another; return tensors in tuples or dicts from forward="
        )
    if gradients:
        _differentiable(model, batch, task)


def _made_anew(outputs: Any) -> Any:
    """Outputs as scoring makes them of the values that it computes."""
    try:
        return Form(outputs).build(leaves(outputs))
    except Exception as error:  # whatever the constructors raise
        raise ValueError(
            f"expected outputs that can be made anew of what they hold, but {type(outputs).__name__} cannot ({error}); "
            "return tensors in tuples or dicts from forward="
        ) from error


def _differentiable(model: nn.Module, batch: Batch, task: Task) -> None:
    with torch.enable_grad(), all_trained(model):
        differentiable(task(model, batch))


def _judged(model: nn.Module, batch: Batch, task: Task) -> tuple[Batch, Any, float]:
    """A batch, the model's outputs and their loss."""
    outputs = task.outputs(model, batch)
    return batch, outputs, float(task.judge(outputs, batch))
