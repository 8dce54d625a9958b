"""Batch norms folded into the layers in front of them, for deployment."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from . import checks
from .batches import Batch
from .graph import batchnorm
from .graph.groups import module_of
from .graph.layer import is_affine
from .graph.trace import Env, Forward, Trace, trace
from .isolation import plain_torch, preserved_random_state, same_modes
from .numerics import alike
from .task import Task
from .wrappers import unwrapped

log = logging.getLogger("singe")


@dataclass(frozen=True, eq=False)
class Folding:
    """A network with batch norms folded away.

    Attributes:
        model: a copy of the network given, with ``torch.nn.Identity`` where batch norms were folded.
        folded: names of those batch norms.
        unfolded: names of the batch norms that stay -> why.
    """

    model: nn.Module
    folded: tuple[str, ...]
    unfolded: dict[str, str]


def fold_batchnorm(model: nn.Module, example: Any, *, forward: Forward | None = None) -> Folding:
    """Folds every batch norm that alone reads a convolution or linear layer into that layer.

    With a = gamma / sqrt(var + eps): W' = a W and b' = a (b - mean) + beta. Outputs in eval mode stay the same, which
    is checked on the example after every fold. A folded network no longer normalises batches, so train it first.

    Args:
        model: not modified. Wrapped or compiled, the module inside is taken.
        example: inputs x [B, ...] of ``model(x)``, or whatever ``forward`` takes; a few samples are enough.
        forward: (model, example) -> outputs, for a model that is not ``model(x)``.

    Raises:
        TypeError, ValueError: bad input; see the message.
    """
    model = unwrapped(model)
    task, device = Task(forward), checks.sound_model(model)
    with torch.no_grad(), plain_torch(device), preserved_random_state():
        batch = checks.example(example, device, task)
        work = checks.copied(model)
        checks.runs(work, batch, task)
        graph, expected = trace(work, task.inputs(batch), task.call), task.outputs(work, batch)
        live = graph.live(work)
        folded: list[str] = []
        unfolded: dict[str, str] = {}
        for name in [n for n, m in work.named_modules() if isinstance(m, _BatchNorm)]:
            try:
                undo = _fold(work, graph, live, _layer_before(work, graph, live, name), name)
                if not _answers(work, batch, task, expected):
                    undo()
                    raise _Unfoldable("the outputs change: the model's code does more with it than call it")
                folded.append(name)
            except _Unfoldable as reason:
                unfolded[name] = str(reason)
                log.info("%s is not folded: %s", name, reason)
        same_modes(work, model)
    return Folding(work, tuple(folded), unfolded)


class _Unfoldable(Exception):
    """Why a batch norm stays."""


def _layer_before(model: nn.Module, graph: Trace, live: Env, name: str) -> fx.Node:
    """The convolution or linear layer that a batch norm can be folded into; raises _Unfoldable if there is none."""
    norm = model.get_submodule(name)
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise _Unfoldable(f"{type(norm).__name__} has a forward of its own")
    if norm._forward_hooks or norm._forward_pre_hooks:
        raise _Unfoldable("it has forward hooks")
    nodes = [n for n in graph.nodes if batchnorm.is_batch_norm(n) and batchnorm.module(graph, n) == name]
    if not nodes:
        raise _Unfoldable("is not used with its own statistics in eval mode")
    if len(nodes) > 1:
        raise _Unfoldable(f"is used {len(nodes)} times in eval mode")
    layer: Any = nodes[0].args[0]
    if not is_affine(layer):
        place = "the input" if layer in graph.inputs else str(layer.target)
        raise _Unfoldable(f"stands behind {place}, which it cannot be folded into")
    if batchnorm.following(layer) is not nodes[0]:
        raise _Unfoldable("the layer before it is read by others too, or normalised along another axis")
    weight = graph.parameter(layer, 1, "weight")
    if weight is None or not batchnorm.folds(layer, live):
        raise _Unfoldable("the layer before it has a computed weight, or one of another dtype")
    if not isinstance(model.get_submodule(module_of(weight)), (_ConvNd, nn.Linear)):
        raise _Unfoldable("the weight before it belongs to no convolution or linear module")
    if len(graph.calls(weight)) != 1:
        raise _Unfoldable("the layer before it is used more than once")
    return layer


def _answers(model: nn.Module, batch: Batch, task: Task, expected: Any) -> bool:
    """Whether the model's outputs are the expected ones; the user's code may not get along with an identity."""
    try:
        return alike(task.outputs(model, batch), expected)
    except Exception as error:
        log.debug("a folded network failed: %s", error)
        return False


def _fold(model: nn.Module, graph: Trace, live: Env, call: fx.Node, name: str) -> Callable[[], None]:
    """Puts a batch norm's scale and shift into the layer before it and an identity in its place; returns the undo."""
    layer: Any = model.get_submodule(module_of(graph.parameter(call, 1, "weight") or ""))
    before, norm, identity = (layer.weight, layer.bias), model.get_submodule(name), nn.Identity()
    layer.weight, layer.bias = (nn.Parameter(t, layer.weight.requires_grad) for t in batchnorm.folded(call, live))
    _replace(model, norm, identity)

    def undo() -> None:
        layer.weight, layer.bias = before
        _replace(model, identity, norm)

    return undo


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in list(parent._modules.items()):  # every name: named_children tells one only
            if child is old:
                setattr(parent, name, new)
