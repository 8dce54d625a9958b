"""The criterion of reconstruction: the error that the rest of a group cannot make up for, by least squares."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..criteria import Criterion
from ..graph.groups import Group, module_of
from ..graph.point import find_points
from ..graph.trace import Trace, named_tensors
from ..refit.equations import Wanted
from ..refit.regression import ridge

log = logging.getLogger("singe")

WIDEST = 8192
"""The most columns of a reader whose equations are solved; their inverse takes 512 MiB."""


_DEAD = 1 / 8
"""The share of zeros above which they are dropped."""


@dataclass(eq=False)
class _System:
    """The equations of a reader, or of one group of a convolution.

    Attributes:
        columns: int64 [neurons, k]: those that read each neuron that is left.
        inverse: float64 [F, F]: of X^T X + lambda, for the neurons that are left.
        weights: float64 [F, M]: the best ones.
        scale: the sum of squares of the output, about its mean.
        zeros: how many of the F columns belong to neurons that are gone.
    """

    columns: Tensor
    inverse: Tensor
    weights: Tensor
    scale: float
    zeros: int = 0

    def costs(self, neurons: Tensor) -> Tensor:
        """[len(neurons)]: the rise of the least sum of squares without each of them, as a share."""
        columns = self.columns[neurons]
        inverse = self.inverse[columns[:, :, None], columns[:, None]]  # [n, k, k]
        weights = self.weights[columns]
        products = weights @ weights.mT  # of traces of W^T I^-1 W, which hold for all outputs at once
        return (torch.linalg.inv(inverse) * products).sum((1, 2)) / self.scale

    def remove(self, neuron: int) -> None:
        """Block elimination: the rest is as if solved from scratch."""
        gone = self.columns[neuron]
        lever = self.inverse[:, gone] @ torch.linalg.inv(self.inverse[gone][:, gone])
        self.weights.addmm_(lever, self.weights[gone], alpha=-1)
        self.inverse.addmm_(lever, self.inverse[gone], alpha=-1)  # without a second [F, F]
        self.weights[gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0
        self.columns[neuron] = -1
        self.zeros += len(gone)
        if self.zeros > len(self.inverse) * _DEAD:
            self._shrink()

    def _shrink(self) -> None:
        """Drops the zeros, so that removals cost less and less."""
        left = self.inverse.diagonal().nonzero().flatten()
        place = torch.full((len(self.inverse) + 1,), -1, device=left.device)
        place[left] = torch.arange(len(left), device=left.device)
        self.columns = place[self.columns]  # -1 stays what it is
        self.weights, self.inverse = self.weights[left], self.inverse[left[:, None], left]
        self.zeros = 0


def unfit(trace: Trace, group: Group) -> str | None:
    """Why the neurons of a group cannot be scored: none of their readers can be refitted; None where one can."""
    reasons = {module_of(weight): _unfit(trace, weight) for weight in group.readers}
    if any(reason is None for reason in reasons.values()):
        return None
    said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"no reader can be refitted ({said or 'no layer reads it'})"


def _unfit(trace: Trace, weight: str) -> str | None:
    points = find_points(trace, weight)
    if isinstance(points, str):
        return points
    layer = points[0].layer
    columns = layer.kernel({layer.weight_node: layer.weight_node.meta["val"]})[0].numel()
    return f"it has {columns} columns, more than {WIDEST}" if columns > WIDEST else None


class Reconstructor:
    """Scores the neurons of one group while they are removed one by one, as an engine does.

    Args:
        model: pruned so far.
        trace: of its current state.
        group: of the neurons; its indices count in the model as it is.
        wanted: the values that its readers are to have.

    Raises:
        ValueError: no reader of the group can be refitted, see :func:`unfit`.
    """

    forgets_alone = True

    def __init__(self, model: nn.Module, trace: Trace, group: Group, wanted: Wanted) -> None:
        self._name, self._size, self._wanted = group.name, group.size, wanted
        self._systems: list[_System] = []
        if (reason := unfit(trace, group)) is not None:
            raise ValueError(f"expected a group that can be reconstructed, but of {group.name} {reason}")
        for weight in group.readers:
            if (reason := _unfit(trace, weight)) is not None:
                log.info("%s is not used to score %s: %s", module_of(weight), group.name, reason)
            else:
                self._systems += self._solve(model, trace, group, weight, wanted)

    @property
    def memory(self) -> int:
        """Bytes that passes may take, so far as the device had room for them."""
        return self._wanted.memory

    def scores(self, criterion: Criterion, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)] on the CPU: the error that refitting cannot make up for, summed over the readers."""
        neurons = torch.arange(self._size) if neurons is None else neurons
        costs = [system.costs(neurons) for system in self._systems]
        scores = torch.stack(costs).sum(0).cpu() if costs else torch.zeros(len(neurons), dtype=torch.float64)
        if not scores.isfinite().all():
            raise ValueError(f"scores of {self._name} are not finite: what its readers read or write overflows")
        return scores

    def lasting(self, criterion: Criterion) -> bool:
        """Whether scores stay the same when others are removed."""
        return False

    def forget(self, neuron: int) -> None:
        """Removes a neuron."""
        for system in self._systems:
            system.remove(neuron)

    @torch.no_grad()
    def _solve(self, model: nn.Module, trace: Trace, group: Group, weight: str, wanted: Wanted) -> list[_System]:
        found = wanted.equations(model, trace, weight)
        if isinstance(found, str):  # nothing is lost with what no sample reaches
            log.info("%s is not used to score %s: %s", module_of(weight), self._name, found)
            return []
        rows = found.as_kernel(named_tensors(model)[weight]).flatten(1)
        neuron = found.neurons(group.read(weight)).repeat_interleave(found.x.shape[2])
        order = neuron.argsort(stable=True)
        columns = order[neuron[order] >= 0].view(group.size, -1)
        systems = []
        for x, missing, own in zip(
            found.x.chunk(found.groups, 1), found.missing.chunk(found.groups, 1), rows.chunk(found.groups), strict=True
        ):
            x, missing = x.flatten(1).double(), missing.double()
            y = x @ own.T.double() + missing
            mean = torch.zeros_like(x[0])
            if found.offset is not None:
                mean = x.mean(0)
                for value in (x, missing, y):
                    value -= value.mean(0)
            cost = ridge(x.square().sum(), mean, len(x), found.x.dtype)
            if not cost:  # constants, which a bias makes up for
                continue
            squares = x.T @ x
            squares.diagonal().add_(cost)
            factor, failed = torch.linalg.cholesky_ex(squares)  # fails where values overflow
            inverse = torch.linalg.inv(squares) if failed else torch.cholesky_inverse(factor)
            weights = own.T.double() + inverse @ (x.T @ missing)
            systems.append(_System(columns.clone(), inverse, weights, max(float(y.square().sum()), 1e-300)))
        return systems
