"""Whether the gradients of a network are those of the operators that its graph consists of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

from ..graph.export import GradientsAsTheyAre
from ..graph.nodes import described
from ..graph.trace import Trace, evaluate, named_tensors
from ..models.batches import Batch, head, length
from ..models.isolation import all_trained, seed_everything
from ..task import Task
from .backward import gradients

_WITHOUT_GRADIENTS = "take a criterion without gradients, such as 'reconstruction' or 'magnitude'"
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.1
_NEGLIGIBLE = 1e-3
"""Of these, as a share of the norm of all gradients together: what a gradient may be off by if it is small itself."""


def check_own_gradients(model: nn.Module, graph: Trace, batch: Batch, task: Task) -> None:
    """Raises ValueError if the graph's gradients are not the network's.

    Export keeps what a ``torch.autograd.Function`` does forwards, and forgets its ``backward``, such as that of a
    straight-through estimator; scores by gradients would be of another network. And some operators of a graph have no
    derivative, although what they came from has one.

    Args:
        model: a working copy, in eval mode.
        graph: of the model.
        batch: on the model's device.
        task: how the model is called and judged.
    """
    with torch.enable_grad(), all_trained(model) as parameters:
        try:
            few = head(batch, 16) if graph.dynamic else batch
            loss = _loss(model, few, task)
        except (RuntimeError, ValueError, IndexError):  # the model or the loss takes whole batches only
            few = batch
            loss = _loss(model, few, task)
        functions = sorted({node.name().removesuffix("Backward") for node in _own_functions(loss)})
        if functions:
            loss.backward()  # reentrant checkpoints do not go with torch.autograd.grad
        own = {id(p): p.grad.to_dense() for p in parameters if p.grad is not None}
        del loss  # two graphs at a time would take twice the memory
        by_graph, leaves = _by_graph(model, graph, few, task)
        if not functions:
            return
        of_operators, whole = _summed(by_graph, leaves, parameters), _norm(own.values())
    if not all(_close(of_operators[key], gradient, whole) for key, gradient in own.items()):
        raise ValueError(
            f"expected gradients as the model's forward pass has them, but the backward pass of {', '.join(functions)} "
            f"gives others, by which it cannot be scored; {_WITHOUT_GRADIENTS}"
        )


def _loss(model: nn.Module, batch: Batch, task: Task) -> Tensor:
    """The loss by the model's own code, but for its switches of gradients, which scores ignore, too."""
    with GradientsAsTheyAre():
        outputs = task.outputs(model, batch)
    seed_everything(0)  # a loss may draw
    return task.judge(outputs, batch)


def _own_functions(loss: Tensor) -> list[Any]:
    """The functions with a backward pass in Python among those that a loss is differentiated through, without hooks."""
    return [f for f in _functions(loss) if isinstance(f, BackwardCFunction) and "BackwardHook" not in type(f).__name__]


def _functions(loss: Tensor) -> dict[Any, None]:
    """The functions that a loss is differentiated through."""
    seen, todo = dict[Any, None](), [cast(Any, loss.grad_fn)]
    while todo:
        function = todo.pop()
        if function is not None and function not in seen:
            seen[function] = None
            todo += [before for before, _ in function.next_functions]
    return seen


def _by_graph(model: nn.Module, graph: Trace, batch: Batch, task: Task) -> tuple[Tensor, list[tuple[int, Tensor]]]:
    """The loss by the graph, and the values that it is a function of, each with the id of its parameter.

    Raises:
        ValueError: an operator on the way has no derivative.
    """
    env, size, tensors = graph.live(model), length(batch), named_tensors(model)
    nodes = {node: tensors[name] for node, name in graph.state.items() if isinstance(tensors[name], nn.Parameter)}
    leaves = {node: env[node].requires_grad_() for node, p in nodes.items() if p.is_floating_point()}
    env |= graph.feed(task.inputs(batch)) | leaves
    underivable = dict[Any, fx.Node]()

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = evaluate(node, args, kwargs)
        functions = [v.grad_fn for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
        underivable.update((f, node) for f in functions if type(f).__name__ == "NotImplemented")
        return value

    graph.run(graph.nodes, env, size, keep=graph.outputs, call=call)
    seed_everything(0)
    loss = task.judge(graph.unflatten([env[node] for node in graph.outputs], size), batch)
    if on_the_way := _functions(loss).keys() & underivable.keys():
        named = ", ".join(sorted({described(underivable[f]) for f in on_the_way}))
        raise ValueError(f"expected operators that torch can differentiate, got {named}; {_WITHOUT_GRADIENTS}")
    return loss, [(id(nodes[node]), leaf) for node, leaf in leaves.items()]


def _summed(loss: Tensor, leaves: Sequence[tuple[int, Tensor]], parameters: Iterable[Tensor]) -> dict[int, Tensor]:
    """The loss's gradient: id of each parameter -> its own, summed over its uses; 0 for those without any."""
    found = {id(p): torch.zeros_like(p) for p in parameters}
    for (key, _), gradient in zip(leaves, gradients([loss], None, [leaf for _, leaf in leaves]), strict=True):
        found[key] += gradient
    return found


def _close(actual: Tensor, expected: Tensor, whole: float) -> bool:
    """Whether two gradients agree, as precisely as their dtype allows, or are small in a network's ``whole``."""
    tolerance = _TOLERANCE.get(expected.dtype, _HALF_TOLERANCE)
    return _norm([actual - expected]) <= tolerance * (_norm([expected]) + _NEGLIGIBLE * whole)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(tensor.double().norm()) for tensor in tensors))
