"""The minimum that scoring needs: the convolutions and linear layers after a layer, alone, and their multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from engine.subject import Subject, memory_format
from singe.graph.groups import Group
from singe.graph.layer import is_affine
from singe.graph.suffix import cut
from singe.graph.trace import Env, evaluate


def suffix_layers(subject: Subject, group: Group, samples: int) -> list[Callable[[], None]]:
    """Each convolution and linear layer after a group, forward and input gradient, on random values of its shapes."""
    live = subject.graph.live(subject.folded)
    return [_both_ways(subject, live, call, samples) for call in _affine_behind(subject, group)]


def suffix_macs(subject: Subject, group: Group) -> int:
    """Multiply-adds after a group for one sample, forward only."""
    return sum(_positions(subject, call) * _weight(subject, call).numel() for call in _affine_behind(subject, group))


def row_macs(subject: Subject, group: Group) -> int:
    """Multiply-adds of the gradient of one row for one sample."""
    (call,) = subject.graph.calls(group.writers[0])
    return _positions(subject, call) * _weight(subject, call)[0].numel()


def multiply_adds(way: Callable[[], object]) -> int:
    """Multiply-adds of a call as torch counts them: not those of native operators, nor all of them under vmap."""
    counter = FlopCounterMode(display=False)
    with counter:
        way()
    return counter.get_total_flops() // 2


def suffix_bytes(subject: Subject, group: Group) -> int:
    """Bytes of all values after a group for one batch."""
    return subject.graph.nbytes(cut(subject.graph, subject.graph.calls(group.writers[0])).nodes, subject.size)


def _affine_behind(subject: Subject, group: Group) -> list[fx.Node]:
    return [n for n in cut(subject.graph, subject.graph.calls(group.writers[0])).nodes if is_affine(n)]


def _weight(subject: Subject, call: fx.Node) -> Tensor:
    return subject.folded.get_parameter(subject.graph.parameter(call, 1, "weight"))


def _positions(subject: Subject, call: fx.Node) -> int:
    """How many values a channel of a layer's output has for one sample."""
    return math.prod(subject.graph.shape(call, 1)) // len(_weight(subject, call))


def _both_ways(subject: Subject, live: Env, call: fx.Node, samples: int) -> Callable[[], None]:
    source, weight, *others = call.args
    leaf, delta = (_random(subject.graph.shape(node, samples), live[weight]) for node in (source, call))
    others = [live[o] if isinstance(o, fx.Node) else o for o in others]
    leaf.requires_grad_()

    def run() -> None:
        with torch.enable_grad():
            out = evaluate(call, (leaf, live[weight], *others), dict(call.kwargs))
        torch.autograd.grad(out, leaf, delta)

    return run


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    value = torch.randn(shape, device=like.device)
    return value.contiguous(memory_format=memory_format(like.device)) if value.dim() == 4 else value
