"""Where on the fading path the gradient is taken, and with which weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import values

Nodes = tuple[Tensor, Tensor]


class Quadrature(Protocol):
    """Nodes t in (0, 1] of the path t -> t W, 1 = the neuron as it is, and their weights (both float64 [S])."""

    def dt(self) -> Nodes:
        """Nodes and weights for the integral of g(t) dt over [0, 1]."""

    def log_dt(self) -> Nodes:
        """Nodes and weights for the integral of g(t) dt / t."""


@dataclass(frozen=True)
class Geometric:
    """The paper's literal sums over t = mu^s, s = 0 .. S (Yvinec et al. 2022, equation 5).

    ``dt`` weighs node s by mu^s, ``log_dt`` by 1. Times (1 - mu), the first is an upper-end Riemann sum of the
    integral that :class:`GaussLegendre` computes.

    Args:
        mu: factor between two steps, in (0, 1).
        steps: S; by default the smallest with mu^S <= tol.
        tol: where the path ends if ``steps`` is not given, in (0, 1).
    """

    mu: float = 0.95
    steps: int | None = None
    tol: float = 0.01

    def __post_init__(self) -> None:
        values.fraction("mu", self.mu)
        values.fraction("tol", self.tol)
        if self.steps is not None:
            values.integer("steps", self.steps, 1)

    def dt(self) -> Nodes:
        t = self._t()
        return t, t.clone()

    def log_dt(self) -> Nodes:
        t = self._t()
        return t, torch.ones_like(t)

    def _t(self) -> Tensor:
        steps = self.steps
        if steps is None:
            # the small offset keeps an exact power from rounding up to one step more
            steps = math.ceil(math.log(self.tol) / math.log(self.mu) - 1e-9)
        return torch.tensor(self.mu, dtype=torch.float64) ** torch.arange(steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class GaussLegendre:
    """Gauss-Legendre quadrature: exact for polynomials of degree 2 nodes - 1; never uses t = 0.

    ``dt`` integrates over t in [0, 1]; ``log_dt`` integrates over ln t in [ln tol, 0].

    Args:
        nodes: number of nodes, at least 1. Two rank neurons like the paper's 91 steps, see ``docs/choices.md``.
        tol: lower end of the logarithmic path, in (0, 1); unused by ``dt``.
    """

    nodes: int = 2
    tol: float = 0.01

    def __post_init__(self) -> None:
        values.integer("nodes", self.nodes, 1)
        values.fraction("tol", self.tol)

    def dt(self) -> Nodes:
        return self._on(0.0, 1.0)

    def log_dt(self) -> Nodes:
        u, weight = self._on(math.log(self.tol), 0.0)
        return u.exp(), weight

    def _on(self, low: float, high: float) -> Nodes:
        x, w = np.polynomial.legendre.leggauss(self.nodes)
        half = (high - low) / 2
        return torch.from_numpy(low + half * (x + 1)), torch.from_numpy(half * w)
