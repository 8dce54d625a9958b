"""Refits the layers that read pruned neurons, so that the network goes on as before: no labels, no gradients."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..graph import batchnorm
from ..graph.groups import Group, module_of
from ..graph.layer import is_layer
from ..graph.trace import Trace, named_tensors
from .equations import Equations, Wanted
from .regression import Regressions

log = logging.getLogger("singe")

Compensate = Literal["none", "mean", "least_squares"]


class Compensator:
    """Refits the readers of a group after neurons of it have been removed.

    A reader's weights W and bias b become those that minimise |X W + b - Z|^2 + lambda |W - W_0|^2, where X are its
    inputs now and Z the outputs it should have; see :meth:`singe.refit.equations.Wanted.equations`.

    Args:
        wanted: the values that layers are to have.
        how: "mean" changes biases alone, "least_squares" weights too.
    """

    def __init__(self, wanted: Wanted, how: Compensate) -> None:
        self._wanted, self._how = wanted, how

    def refit(self, model: nn.Module, trace: Trace, group: Group) -> dict[str, str]:
        """Refits the layers that read a group, in execution order.

        Args:
            model: pruned, changed in place.
            trace: of its current state.
            group: with slices of any coordinates.

        Returns:
            the readers that are left unchanged -> why.
        """
        return self._solved(model, self.equations(model, trace, group))

    def refit_all(self, model: nn.Module, trace: Trace) -> dict[str, str]:
        """Refits every layer that a removal reaches, in execution order, whether or not it is pruned itself.

        Before that, only the layers that read a group have been refitted to their new inputs; those that wrote it, and
        layers further downstream, have not.

        Args:
            model: pruned, changed in place.
            trace: of its current state.

        Returns:
            the layers that are left unchanged -> why.
        """
        weights = reached(trace, {name for name, _ in self._wanted.plan.removed()})
        found = ((weight, self._wanted.equations(model, trace, weight)) for weight in weights)
        return self._solved(model, ((weight, e if isinstance(e, str) else e.enough()) for weight, e in found))

    def _solved(self, model: nn.Module, found: Iterable[tuple[str, Equations | str]]) -> dict[str, str]:
        """Solves equations, each before the next are computed; returns modules that are left unchanged -> why."""
        refused: dict[str, str] = {}
        for weight, equations in found:
            if isinstance(equations, str):
                reason: str | None = equations
            else:
                reason = self.solve(model, weight, equations, self.regressions(equations))
            if reason is not None:
                refused[module_of(weight)] = reason
                log.info("%s is not refitted: %s", module_of(weight), reason)
        return refused

    def equations(self, model: nn.Module, trace: Trace, group: Group) -> Iterator[tuple[str, Equations | str]]:
        """The weight of every reader with its equations, or why it has none, each computed when it is its turn."""
        for weight in group.readers:
            yield weight, self._wanted.equations(model, trace, weight)

    def solve(self, model: nn.Module, weight: str, equations: Equations, regressions: Regressions) -> str | None:
        """Changes a reader's weight and offset in place to the best solution of its equations, or says why not.

        With weights, and plenty of equations, the batch norm that follows gets new statistics, see
        :func:`singe.graph.batchnorm.restate`.

        Args:
            model: holds the reader.
            weight: its own.
            equations: of the reader.
            regressions: of them, perhaps without inputs that are gone in this model; see :meth:`regressions`.
        """
        tensors = named_tensors(model)
        trained = any(p.requires_grad for p in model.parameters())

        def fixed(name: str) -> bool:
            return trained and isinstance(tensors[name], nn.Parameter) and not tensors[name].requires_grad

        if fixed(weight):
            return "its weight is not to be trained"
        offset, norm = equations.offset, equations.restated
        if offset is not None and fixed(offset[0]):
            offset = None
        if self._how == "mean":
            if offset is None:
                return "it has no bias of its own to change, and no batch norm of its own follows it"
            _add(tensors[offset[0]], offset[1] * regressions.mean_y)
            return None
        change, constant = regressions.solve(offset is not None)
        _add(tensors[weight], equations.as_weight(change).view_as(tensors[weight]))
        if offset is not None:
            _add(tensors[offset[0]], offset[1] * constant)
        if norm is not None and not fixed(norm.scale) and not fixed(norm.shift):
            biased = offset is not None and offset[1] == 1
            batchnorm.restate(norm, tensors, *regressions.outputs(change, constant * biased))
        return None

    def regressions(self, equations: Equations) -> Regressions:
        """What is solved: for the weights, too, or for the offset alone."""
        return equations.regressions(inputs=self._how == "least_squares")


@torch.no_grad()
def _add(tensor: Tensor, change: Tensor) -> None:
    tensor += change.to(tensor.dtype)


def reached(trace: Trace, owned: Collection[str]) -> list[str]:
    """The weights of the convolutions and linear layers downstream of some tensors or holding them, in order."""
    weights = (trace.parameter(node, 1, "weight") for node in trace.downstream(owned) if is_layer(node))
    return list(dict.fromkeys(weight for weight in weights if weight is not None))
