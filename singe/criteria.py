"""Measures of relevance: the paper's criteria (Yvinec et al. 2022, equations 1 to 5), the greedy oracle and chance.

Notation: L is the loss on one batch, W the weight row of a neuron with its batch norm folded in, t in (0, 1] its place
on the path that fades the neuron (1 = as it is). A neuron that owns several rows scores the sum over them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from . import values
from .quadrature import GaussLegendre, Nodes, Quadrature

Path = Literal["neuron", "layer"]


@dataclass(frozen=True)
class PathRule:
    """How the engine turns gradients on the path into a score: sum over nodes of weight * |W|^norm * |grad|.

    Attributes:
        path: "neuron" fades one neuron at a time, "layer" all neurons of the group at once.
        nodes: t and weight, float64 [S] each.
        with_norm: whether each term is multiplied by the weight row's norm at t = 1.
    """

    path: Path
    nodes: Nodes
    with_norm: bool


class Criterion:
    """A score per neuron; the least relevant neuron has the smallest."""

    @property
    def scores_together(self) -> bool:
        """Whether one pass scores all neurons of a group, so that fewer cost no less."""
        return True

    @property
    def reads_loss(self) -> bool:
        """Whether scores depend on the loss."""
        return self.takes_gradients

    @property
    def takes_gradients(self) -> bool:
        """Whether scores are made of the loss's gradients."""
        return False

    def __repr__(self) -> str:
        """The same in every process, as a checkpoint and other ranks compare it; dataclasses have their own."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass(frozen=True)
class NormCriterion(Criterion):
    """A criterion made of norms.

    Args:
        p: order of the norms: 1, 2 or ``math.inf``.
    """

    p: float = 2

    def __post_init__(self) -> None:
        if self.p not in (1, 2, math.inf):
            raise ValueError(f"expected p in (1, 2, inf), got {self.p!r}")


class WeightCriterion(Criterion, ABC):
    """A criterion that looks at weights alone, and needs no data."""

    @abstractmethod
    def of_rows(self, rows: Tensor) -> Tensor:
        """[R], a value for each of the rows that a layer has in a group, float64 [R, F], batch norm folded in.

        Rows of neurons that have already been removed are zero; their values do not matter.
        """

    @property
    def lasting(self) -> bool:
        """Whether a row's value stays the same when others are removed."""
        return False


@dataclass(frozen=True)
class Magnitude(NormCriterion, WeightCriterion):
    """|W|_p."""

    def of_rows(self, rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(rows, self.p, dim=1)

    @property
    def lasting(self) -> bool:
        return True


class PathCriterion(NormCriterion, ABC):
    """A criterion made of gradients at points of the fading path."""

    @abstractmethod
    def rule(self) -> PathRule:
        """The nodes and weights this criterion sums over."""

    @property
    def scores_together(self) -> bool:
        return self.rule().path == "layer"

    @property
    def takes_gradients(self) -> bool:
        return True


_UNFADED: Nodes = (torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))


@dataclass(frozen=True)
class Gradient(PathCriterion):
    """|dL/dW|_p at the network as it is."""

    def rule(self) -> PathRule:
        return PathRule("layer", _UNFADED, with_norm=False)


@dataclass(frozen=True)
class MagnitudeGradient(PathCriterion):
    """|W|_p * |dL/dW|_p at the network as it is."""

    def rule(self) -> PathRule:
        return PathRule("layer", _UNFADED, with_norm=True)


@dataclass(frozen=True)
class FadingCriterion(PathCriterion):
    """A criterion that sums over the whole path.

    Args:
        p: order of the norms.
        quadrature: nodes on the path.
        path: "neuron" fades one neuron at a time (equation 4 as written), "layer" the whole layer at once.
    """

    quadrature: Quadrature = field(default_factory=GaussLegendre)
    path: Path = "neuron"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.quadrature, type) or not (
            hasattr(self.quadrature, "dt") and hasattr(self.quadrature, "log_dt")
        ):
            raise TypeError(f"expected a quadrature object such as GaussLegendre(2), got {self.quadrature!r}")
        values.choice("path", self.path, get_args(Path))


@dataclass(frozen=True)
class SummedGradient(FadingCriterion):
    """Sum over the path of |dL/d(tW)|_p; with Gauss-Legendre, its integral dt / t."""

    def rule(self) -> PathRule:
        return PathRule(self.path, self.quadrature.log_dt(), with_norm=False)


@dataclass(frozen=True)
class IntegratedGradient(FadingCriterion):
    """SInGE's own: sum over the path of |tW|_p * |dL/d(tW)|_p; with Gauss-Legendre, |W|_p times its integral dt."""

    def rule(self) -> PathRule:
        return PathRule(self.path, self.quadrature.dt(), with_norm=True)


@dataclass(frozen=True)
class LossChange(Criterion):
    """L without the neuron minus L: what every other criterion tries to predict, for one forward pass a neuron."""

    @property
    def scores_together(self) -> bool:
        return False

    @property
    def reads_loss(self) -> bool:
        return True


@dataclass(frozen=True)
class Reconstruction(Criterion):
    """The error that refitting the readers cannot make up for once the neuron is gone; needs no labels or gradients.

    It is the rise of the least of |X W + b - Z|^2 + lambda |W - W_0|^2 over W and b without the neuron's columns of X,
    as a share of the squares of Z, summed over the readers; see ``singe.refit.compensation.Compensator`` for X and Z.
    For the columns J and P = (X^T X + lambda)^-1 that is tr(W_J^T P_JJ^-1 W_J) (Hassibi & Stork 1993, in blocks).
    """


@dataclass(frozen=True)
class FeatureRelevance(Criterion):
    """How much the neuron contributes to the true class, by relevance propagated back from there (Aketi et al. 2020).

    See ``singe.scoring.relevance``. Batches are (x, y) with class indices y, and the network returns logits
    [B, classes].

    Args:
        alpha: share of what excites in layers with weights, at least 1; beta = alpha - 1 is that of what inhibits.
    """

    alpha: float = 2

    def __post_init__(self) -> None:
        if not 1 <= values.number("alpha", self.alpha) < math.inf:
            raise ValueError(f"expected alpha >= 1, got {self.alpha!r}")


@dataclass(frozen=True)
class Random(Criterion):
    """A number from torch's global generator, which is seeded for every group: the baseline that others must beat."""


_BY_NAME: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "gradient": Gradient(),
    "magnitude_gradient": MagnitudeGradient(),
    "summed_gradient": SummedGradient(),
    "integrated_gradient": IntegratedGradient(),
    "loss_change": LossChange(),
    "reconstruction": Reconstruction(),
    "feature_relevance": FeatureRelevance(),
    "random": Random(),
}


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of a name, or the object itself.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor a criterion.
    """
    if isinstance(criterion, str):
        if criterion not in _BY_NAME:
            raise ValueError(f"expected a criterion among {', '.join(_BY_NAME)}, got {criterion!r}")
        return _BY_NAME[criterion]
    if isinstance(criterion, type):
        raise TypeError(f"expected a criterion's name or object, got the class {criterion.__name__}: call it first")
    known = (WeightCriterion, PathCriterion, LossChange, Random, Reconstruction, FeatureRelevance)
    if not isinstance(criterion, known):
        bases = ", ".join(base.__name__ for base in known)
        remark = "; the loss is passed as loss=" if callable(criterion) else ""
        raise TypeError(f"expected a criterion's name, or an object of {bases}, got {type(criterion).__name__}{remark}")
    return criterion


def resolve_elementwise(criterion: str | Criterion) -> Criterion:
    """The criterion of a name, on the path of the layer where it has a path; or the object itself.

    Raises:
        ValueError: unknown name, a criterion that cannot score single weights, or an object on another path.
        TypeError: neither a name nor a criterion.
    """
    found = resolve(criterion)
    if not isinstance(found, (Magnitude, PathCriterion, Random)):
        raise ValueError(f"expected a criterion that scores single weights with structured=False, got {criterion!r}")
    if isinstance(found, FadingCriterion) and found.path != "layer":
        if not isinstance(criterion, str):
            raise ValueError(f"expected path='layer' with structured=False, single weights have no other, got {found}")
        return replace(found, path="layer")
    return found
