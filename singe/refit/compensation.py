"""Refits the layers that read pruned neurons, so that the network goes on as before: no labels, no gradients."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..graph import batchnorm
from ..graph.groups import Group, module_of
from ..graph.layer import is_layer
from ..graph.trace import Trace, named_tensors
from .equations import Equations, Wanted

log = logging.getLogger("singe")

Compensate = Literal["none", "mean", "least_squares"]

RIDGE = 1e-4
"""The penalty on changing weights, as a share of the mean square of the inputs."""


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
            reason = equations if isinstance(equations, str) else self.solve(model, weight, equations)
            if reason is not None:
                refused[module_of(weight)] = reason
                log.info("%s is not refitted: %s", module_of(weight), reason)
        return refused

    def equations(self, model: nn.Module, trace: Trace, group: Group) -> Iterator[tuple[str, Equations | str]]:
        """The weight of every reader with its equations, or why it has none, each computed when it is its turn."""
        for weight in group.readers:
            yield weight, self._wanted.equations(model, trace, weight)

    @torch.no_grad()
    def solve(self, model: nn.Module, weight: str, equations: Equations) -> str | None:
        """Changes a reader's weight and offset in place to the best solution of its equations, or says why not.

        With weights, and plenty of equations, the batch norm that follows gets new statistics, see
        :func:`singe.graph.batchnorm.restate`.
        """
        tensors = named_tensors(model)
        trained = any(p.requires_grad for p in model.parameters())

        def fixed(name: str) -> bool:
            return trained and isinstance(tensors[name], nn.Parameter) and not tensors[name].requires_grad

        if fixed(weight):
            return "its weight is not to be trained"
        offset, norm, groups = equations.offset, equations.norm, equations.groups
        if offset is not None and fixed(offset[0]):
            offset = None
        if self._how == "mean" and offset is None:
            return "it has no bias of its own to change, and no batch norm of its own follows it"
        inputs = [own.flatten(1) for own in equations.x.tensor_split(groups, 1)]
        if self._how == "mean":
            inputs = [own[:, :0] for own in inputs]
        fits = [
            least_squares(own, wanted, offset is not None)
            for own, wanted in zip(inputs, equations.missing.chunk(groups, 1), strict=True)
        ]
        if offset is not None:
            shift = tensors[offset[0]]
            shift += offset[1] * torch.cat([constant for _, constant in fits]).to(shift.dtype)
        if self._how == "least_squares":
            parameter = tensors[weight]
            change = equations.as_weight(torch.cat([change for change, _ in fits]))
            parameter += change.view_as(parameter).to(parameter.dtype)
            if norm is not None and equations.plenty and not fixed(norm.scale) and not fixed(norm.shift):
                batchnorm.restate(norm, tensors, _output(equations, inputs, fits))
        return None


def _output(equations: Equations, inputs: Sequence[Tensor], fits: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """[n, M], the output of a layer, before its batch norm, once it is refitted."""
    assert equations.output is not None
    output = torch.cat([own @ change.T for own, (change, _) in zip(inputs, fits, strict=True)], 1)
    output += equations.output
    if equations.offset is not None and equations.offset[1] == 1:  # a bias; zero constants where it had to stay
        output += torch.cat([constant for _, constant in fits])
    return output


def reached(trace: Trace, owned: Collection[str]) -> list[str]:
    """The weights of the convolutions and linear layers downstream of some tensors or holding them, in order."""
    weights = (trace.parameter(node, 1, "weight") for node in trace.downstream(owned) if is_layer(node))
    return list(dict.fromkeys(weight for weight in weights if weight is not None))


def least_squares(x: Tensor, y: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """Ridge regression: the [M, F] and [M] that minimise |x change^T + constant - y|^2 + lambda |change|^2.

    Args:
        x: [n, F].
        y: [n, M].
        offset: whether there is a constant; zero otherwise.
    """
    means = [t.mean(0) if offset else torch.zeros_like(t[0]) for t in (x, y)]
    x, y = x - means[0], y - means[1]
    cost = ridge(x, means[0])
    if not cost:  # nothing to learn from
        return x.new_zeros(y.shape[1], x.shape[1]), means[1]
    if x.shape[1] <= len(x):
        squares, products = (x.T @ x).double(), (x.T @ y).double()
        squares.diagonal().add_(cost)
        change = torch.linalg.solve(squares, products).to(x.dtype)
    else:
        squares = (x @ x.T).double()
        squares.diagonal().add_(cost)
        change = x.T @ torch.linalg.solve(squares, y.double()).to(x.dtype)
    return change.T, means[1] - means[0] @ change


def ridge(x: Tensor, mean: Tensor, dtype: torch.dtype | None = None) -> float:
    """Lambda for centred inputs; zero where they are no more than the rounding of constants.

    Args:
        x: [n, F], the inputs less their mean.
        mean: [F].
        dtype: that the inputs were computed in, if it is another.
    """
    squares, rounding = x.square().sum(), 8 * torch.finfo(dtype or x.dtype).eps * mean
    if squares.isfinite() and squares <= len(x) * rounding.square().sum():
        return 0.0
    return RIDGE * float(squares) / max(1, x.shape[1])
