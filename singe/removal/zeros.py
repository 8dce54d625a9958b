"""Zeros that hold: what is masked in a model's weights, and in an optimiser's state for them, while it trains."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..graph.trace import named_tensors
from .surgery import Removed, matching_state

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their size in bytes."""


@dataclass(frozen=True)
class _Held:
    """What is held of one optimiser's tensors.

    Attributes:
        tensors: all of its weights and state, whose memory is nobody else's as long as they are kept here.
        places: where each of them begins.
        products: tensors and what they are multiplied by, those of one dtype and device together.
    """

    tensors: list[Tensor]
    places: list[int]
    products: list[tuple[list[Tensor], list[Tensor]]]


class Zeros:
    """Entries of a model's tensors that are set back to zero whenever an optimiser has moved them.

    Tensors are multiplied by zeros and ones, all in one operator: to fill one axis of one tensor after the other takes
    longer than the optimiser's step. They are multiplied as integers, so that NaN and infinity become zero, too, and
    all other values keep their bits. The factors take as much memory as the tensors.

    Args:
        model: has the tensors.
        removed: which entries; integer attributes among them do not count.
    """

    def __init__(self, model: nn.Module, removed: Removed) -> None:
        self._model, tensors = model, named_tensors(model)
        axes: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)  # of a tensor, by whatever name
        for (name, dim), index in removed.items():
            if name in tensors:
                axes[id(tensors[name])].append((dim, index))
        self._axes = {name: axes[id(tensor)] for name, tensor in tensors.items() if id(tensor) in axes}
        self._factors: dict[Any, Tensor] = {}
        self._held: WeakKeyDictionary[Optimizer, _Held] = WeakKeyDictionary()

    @torch.no_grad()
    def restore(self, optimizer: Optimizer) -> None:
        """Zeroes them in the tensors that an optimiser holds, and in its state for these.

        A backward pass may still need the others as they are, and would not take them once they have been written to.
        """
        tensors, held = _tensors(optimizer), self._held.get(optimizer)
        if held is None or held.places != _places(tensors):  # state is made and loaded, weights are replaced
            held = self._held[optimizer] = self._look(optimizer, tensors)
        for values, factors in held.products:
            torch._foreach_mul_(values, factors)

    def _look(self, optimizer: Optimizer, tensors: list[Tensor]) -> _Held:
        products: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for name, tensor in self._moved_by(optimizer).items():
            for value in (tensor, *matching_state(optimizer, tensor).values()):
                bits = value.detach().view(_INTEGERS[value.element_size()])
                values, factors = products[bits.dtype, bits.device]
                values.append(bits)
                factors.append(self._factor(name, bits, tensor.shape))
        return _Held([t.detach() for t in tensors], _places(tensors), list(products.values()))

    def _moved_by(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The tensors that share memory with an optimiser's, such as a flat one of all weights.

        Each by one name alone: none may be written to twice at once.
        """
        weights = [p for group in optimizer.param_groups for p in group["params"] if p.layout is torch.strided]
        moved = {p.untyped_storage().data_ptr() for p in weights}
        found = {name: attrgetter(name)(self._model) for name in self._axes}
        tensors = {name: t for name, t in found.items() if isinstance(t, Tensor)}
        names = {id(t): name for name, t in tensors.items() if t.untyped_storage().data_ptr() in moved}
        return {name: tensors[name] for name in names.values()}

    def _factor(self, name: str, bits: Tensor, shape: torch.Size) -> Tensor:
        """Zeros and ones for a tensor of some shape, or for state of it, which may be a mean over an axis.

        In memory they lie like ``bits``: one operator would otherwise become many.
        """
        key = name, bits.shape, bits.stride(), bits.dtype, bits.device
        if key not in self._factors:
            factor = self._factors[key] = torch.ones_like(bits)
            for dim, index in self._axes[name]:
                if bits.shape[dim] == shape[dim]:
                    factor.index_fill_(dim, index.to(bits.device), 0)
        return self._factors[key]


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    """An optimiser's weights and its state for them, but for sparse ones, which have no place in memory."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in weights for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return [tensor for tensor in weights + state if tensor.layout is torch.strided]


def _places(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
