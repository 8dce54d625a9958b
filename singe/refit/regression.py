"""Ridge regression that can leave out more and more of its inputs without looking at the equations again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGE = 1e-4
"""The penalty on changing weights, as a share of the mean square of the inputs."""

Solution = tuple[Tensor, Tensor]
"""change [M, F] and constant [M], which minimise |x change^T + constant - y|^2 + lambda |change|^2."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Of at least as many equations as inputs: all that least squares need, all centred, in float64.

    Attributes:
        count: n, how many equations there are.
        dtype: that the inputs were computed in.
        mean_x: [F], of the inputs.
        mean_y: [M], of what is wanted.
        xx: [F, F], products of inputs, summed over the equations.
        xy: [F, M], of inputs with what is wanted.
        mean_z: [M], of the outputs so far; empty where these are not asked for, like the next two.
        xz: [F, M], of inputs with outputs.
        zz: [M], squares of outputs.
    """

    count: int
    dtype: torch.dtype
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    mean_z: Tensor
    xz: Tensor
    zz: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, z: Tensor) -> Moments:
        """Of inputs [n, F], what is wanted [n, M], and outputs [n, M], or [n, 0] if they do not matter."""
        means = [t.mean(0) for t in (x, y, z)]
        cx, cy, cz = (t - mean for t, mean in zip((x, y, z), means, strict=True))
        mean_x, mean_y, mean_z = (mean.double() for mean in means)
        xx, xy, xz = ((cx.T @ t).double() for t in (cx, cy, cz))
        zz = cz.square_().sum(0, dtype=torch.float64)
        return cls(len(x), x.dtype, mean_x, mean_y, xx, xy, mean_z, xz, zz)

    def without(self, columns: Tensor, rows: Tensor) -> Moments:
        """The same once some inputs are zero, and what they contributed is wanted of the others.

        Args:
            columns: int64 [k], the inputs.
            rows: [M, k], the weights that they had.
        """
        rows = rows.double()
        lost, mean_lost = self.xx[:, columns] @ rows.T, self.mean_x[columns] @ rows.T
        mean_x, xx, xy = (t.index_fill(0, columns, 0) for t in (self.mean_x, self.xx, self.xy + lost))
        xx.index_fill_(1, columns, 0)
        less = replace(self, mean_x=mean_x, mean_y=self.mean_y + mean_lost, xx=xx, xy=xy)
        if not len(self.zz):
            return less
        zz = self.zz + (rows.T * (lost - 2 * self.xz)[columns]).sum(0)
        xz = (self.xz - lost).index_fill_(0, columns, 0)
        return replace(less, mean_z=self.mean_z - mean_lost, xz=xz, zz=zz)

    def solve(self, offset: bool) -> Solution:
        """The solution, in float64; without an offset the constant is zero."""
        xx, xy, mean, nothing = self.xx.clone(), self.xy, self.mean_x, torch.zeros_like(self.mean_y)
        if not offset:
            xx.addr_(mean, mean, alpha=self.count)
            xy, mean = torch.addr(xy, mean, self.mean_y, alpha=self.count), torch.zeros_like(mean)
        cost = ridge(xx.trace(), mean, self.count, self.dtype)
        if not cost:  # nothing to learn from
            return torch.zeros_like(xy.T), self.mean_y if offset else nothing
        change = _solved(xx, xy, cost).T
        return change, self.mean_y - change @ mean if offset else nothing

    def outputs(self, change: Tensor, constant: Tensor | float) -> tuple[Tensor, Tensor]:
        """float64 [M] and [M], mean and variance of the outputs once a change and a constant are added."""
        change = change.double()
        spread = self.zz + ((change @ self.xx + 2 * self.xz.T) * change).sum(1)
        return self.mean_z + change @ self.mean_x + constant, spread.clamp_min(0) / self.count


@dataclass(frozen=True, eq=False)
class Samples:
    """Of fewer equations than inputs, or where inputs are not used: the equations themselves.

    Attributes:
        x: [n, F], inputs.
        y: [n, M], what is wanted.
    """

    x: Tensor
    y: Tensor

    @property
    def mean_y(self) -> Tensor:
        """[M]."""
        return self.y.mean(0)

    def without(self, columns: Tensor, rows: Tensor) -> Samples:
        """As of :class:`Moments`."""
        return Samples(self.x.index_fill(1, columns, 0), self.y + self.x[:, columns] @ rows.T.to(self.x.dtype))

    def solve(self, offset: bool) -> Solution:
        """The solution; without an offset the constant is zero."""
        means = [t.mean(0) if offset else torch.zeros_like(t[0]) for t in (self.x, self.y)]
        x, y = self.x - means[0], self.y - means[1]
        cost = ridge(x.square().sum(), means[0], len(x), x.dtype)
        if not cost:
            return x.new_zeros(y.shape[1], x.shape[1]), means[1]
        change = (x.T @ _solved((x @ x.T).double(), y.double(), cost).to(x.dtype)).T
        return change, means[1] - change @ means[0]


def regression(x: Tensor, y: Tensor, z: Tensor) -> Moments | Samples:
    """What is cheaper, of inputs [n, F], what is wanted [n, M], and outputs [n, M], or [n, 0] if they do not matter."""
    return Moments.of(x, y, z) if x.shape[1] <= len(x) else Samples(x, y)


@dataclass(frozen=True, eq=False)
class Regressions:
    """Those of the groups of a convolution, one after the other; of other layers there is one."""

    parts: Sequence[Moments | Samples]

    @property
    def mean_y(self) -> Tensor:
        """[M], the mean of what is wanted."""
        return torch.cat([part.mean_y for part in self.parts])

    def without(self, kernel: Tensor, columns: Tensor) -> Regressions:
        """The same without some inputs.

        Args:
            kernel: [M, C / groups, taps], with which they were read.
            columns: int64, of its second axis.
        """
        taps = kernel.shape[2]
        flat = (columns[:, None] * taps + torch.arange(taps, device=columns.device)).flatten()
        own = kernel[:, columns].flatten(1).chunk(len(self.parts))
        return Regressions([part.without(flat, rows) for part, rows in zip(self.parts, own, strict=True)])

    def solve(self, offset: bool) -> Solution:
        """[M, F / groups] and [M]."""
        changes, constants = zip(*(part.solve(offset) for part in self.parts), strict=True)
        return torch.cat(changes), torch.cat(constants)

    def outputs(self, change: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
        """As of :class:`Moments`, whose outputs are known."""
        own = zip(self.parts, *(t.chunk(len(self.parts)) for t in (change, constant)), strict=True)
        means, variances = zip(*(p.outputs(*found) for p, *found in own if isinstance(p, Moments)), strict=True)
        return torch.cat(means), torch.cat(variances)


def ridge(squares: Tensor, mean: Tensor, count: int, dtype: torch.dtype) -> float:
    """Lambda of inputs; zero where they are no more than the rounding of constants.

    Args:
        squares: the sum of their squares, less the mean.
        mean: [F], of the inputs.
        count: how many equations there are.
        dtype: that the inputs were computed in.
    """
    rounding = 8 * torch.finfo(dtype).eps * mean
    if squares.isfinite() and squares <= count * rounding.square().sum():
        return 0.0
    return RIDGE * float(squares) / max(1, len(mean))


def _solved(squares: Tensor, products: Tensor, cost: float) -> Tensor:
    """(squares + cost)^-1 products; the squares, positive semidefinite, are changed."""
    squares.diagonal().add_(cost)
    factor, failed = torch.linalg.cholesky_ex(squares)  # fails where values overflow
    return torch.linalg.solve(squares, products) if failed else torch.cholesky_solve(products, factor)
