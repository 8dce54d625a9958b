"""Batch norms folded into the layers around them, for deployment."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks
from ..graph.batchnorm import affine_of
from ..graph.trace import Forward, Trace, trace
from ..memory import raise_shortage
from ..models.batches import Batch
from ..models.isolation import plain_torch, preserved_random_state, same_modes
from ..models.numerics import alike, distance
from ..models.wrappers import unwrapped
from ..task import Task
from .ability import unable, why_it_stays
from .absorb import absorbed
from .channels import Channels
from .flow import find_channels
from .roots import Unfoldable, change_without

log = logging.getLogger("singe")


@dataclass(frozen=True, eq=False)
class Folding:
    """A network with batch norms folded away.

    Attributes:
        model: a copy of the network given, with ``torch.nn.Identity`` where batch norms were folded, or with their
            children in a ``torch.nn.Sequential`` where they have some, such as an activation.
        folded: names of those batch norms.
        unfolded: names of the batch norms that stay -> why.
    """

    model: nn.Module
    folded: tuple[str, ...]
    unfolded: dict[str, str]


def fold_batchnorm(model: nn.Module, example: Any, *, forward: Forward | None = None) -> Folding:
    """Folds every batch norm that can be into the affine layers around it: convolutions, linear layers, batch norms.

    A batch norm is y = a x + c per channel, with a = gamma / sqrt(var + eps) and c = beta - a mean. It is folded if the
    search for its roots and leaves closes: if everything that writes the channels before it, through operators that
    move, average or add, is a layer (a root), and so is every other reader of these channels (a leaf), and none is
    both. Roots then write a x + c, W' = a W and b' = a b + c, and leaves undo it, W' = W / a and b' = b - W c / a. Or
    else if the same holds for the channels after it: leaves then apply it, W' = W a and b' = b + W c, and roots undo
    it. No shift gets past zero padding. A layer that is used more than once, holds tied or computed weights or has
    hooks is neither.

    Outputs in eval mode stay the same, which is checked on the example after every fold: to 1e-4 in float32, or to ten
    times the effect of rounding the weights in a network that amplifies it. A folded network no longer normalises
    batches, so train it first. To load what was saved of a folded network, fold one with the same weights: which batch
    norms can be folded depends on them, as one that shifts nothing gets past padding.

    Args:
        model: not modified. If it is wrapped or compiled, the module inside is taken.
        example: inputs x [B, ...] of ``model(x)``, or whatever ``forward`` takes; a few samples are enough.
        forward: (model, example) -> outputs, for a model not called as ``model(x)``.

    Raises:
        TypeError, ValueError: bad input; see the message.
    """
    model = unwrapped(model)
    task, device = Task(forward), checks.sound_model(model)
    with plain_torch(device), torch.no_grad(), preserved_random_state():
        batch = checks.example(example, device, task)
        work = checks.working_copy(model)
        checks.runs(work, batch, task)
        folded, unfolded = _fold_all(work, trace(work, task.inputs(batch), task.call), _Answers(work, batch, task))
        same_modes(work, model)
    for name, reason in unfolded.items():
        log.info("%s is not folded: %s", name, reason)
    return Folding(work, folded, unfolded)


class _Answers:
    """The outputs of a network for an example, before it is modified.

    Args:
        model: in eval mode.
        batch: the example.
        task: how the model is called.
    """

    def __init__(self, model: nn.Module, batch: Batch, task: Task) -> None:
        self._batch, self._task = batch, task
        self._expected = task.outputs(model, batch)
        self._noise = min(10 * distance(task.outputs(_rounded(model), batch), self._expected), 1e-2)

    def are_those_of(self, model: nn.Module) -> bool:
        """Whether a model gives the same outputs; the user's code may fail on the folded model."""
        try:
            actual = self._task.outputs(model, self._batch)
            return alike(actual, self._expected) or distance(actual, self._expected) <= self._noise
        except Exception as error:
            raise_shortage(error)
            log.debug("a folded network failed: %s", error)
            return False


def _rounded(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by as much as rounding would change them."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.device) - 0.5
        parameter.copy_(parameter * (1 + noise * torch.finfo(parameter.dtype).eps))
    return copied


def _fold_all(model: nn.Module, graph: Trace, answers: _Answers) -> tuple[tuple[str, ...], dict[str, str]]:
    """Folds in place until nothing more can be folded; returns the folded batch norms, and the others -> why."""
    channels = find_channels(graph, unable(model, graph))
    names = waiting = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    while True:
        unfolded: dict[str, str] = {}
        for name in waiting:
            try:
                undo = _fold(model, graph, channels, name)
                if not answers.are_those_of(model):
                    undo()
                    raise Unfoldable(_mishap(model, answers, name))
                channels.fold(name)
            except Unfoldable as reason:
                unfolded[name] = str(reason)
        if len(unfolded) == len(waiting):
            return tuple(name for name in names if name not in unfolded), unfolded
        waiting = list(unfolded)  # those that a batch norm now gone prevented may fold now


def _fold(model: nn.Module, graph: Trace, channels: Channels, name: str) -> Callable[[], None]:
    """Puts a batch norm's scale and shift into its roots and leaves and takes it out; returns the undo."""
    norm: Any = model.get_submodule(name)
    reason = why_it_stays(model, graph, [layer.call for layer in channels.norms.get(name, [])], norm)
    if reason is not None:
        raise Unfoldable(reason)
    change = change_without(channels, name, affine_of(norm))
    layers = [layer for layer in channels.layers if layer.name != name and change.concerns(layer)]
    modules: list[Any] = [model.get_submodule(layer.name) for layer in layers]
    for layer, module in zip(layers, modules, strict=True):
        if module.weight.dtype != norm.running_mean.dtype:
            raise Unfoldable(f"depends on {layer.name}, which is of another dtype")
    before = [(module, module.weight, module.bias) for module in modules]
    rest = _rest(norm)
    for layer, module in zip(layers, modules, strict=True):
        weight, bias = absorbed(module, layer, change)
        trained = (module.weight if module.bias is None else module.bias).requires_grad
        module.weight = nn.Parameter(weight, module.weight.requires_grad)
        module.bias = nn.Parameter(bias, trained)  # be it zero: other weights of the same network need one
    _replace(model, norm, rest)

    def undo() -> None:
        for module, weight, bias in before:
            module.weight, module.bias = weight, bias
        _replace(model, rest, norm)

    return undo


def _rest(norm: nn.Module) -> nn.Module:
    """What replaces a batch norm: its children, such as an activation."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else nn.Identity()


def _mishap(model: nn.Module, answers: _Answers, name: str) -> str:
    """Why the outputs changed without a batch norm: do they, too, when it is only hidden inside another module?"""
    norm = model.get_submodule(name)
    hidden = nn.Sequential(norm)
    _replace(model, norm, hidden)
    seen = answers.are_those_of(model)
    _replace(model, hidden, norm)
    what = "rounding is too coarse" if seen else "the model's code does more with it than call it"
    return f"the outputs change when it is folded: {what}"


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):  # the new one may hold the old one
        for name, child in list(parent._modules.items()):  # every name: named_children lists only one
            if child is old:
                setattr(parent, name, new)
