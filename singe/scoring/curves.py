"""Fading curves for people to look at: the gradient's norm along the path of the neurons removed last."""

from __future__ import annotations

import torch

from ..criteria import Criterion, FadingCriterion
from ..records import Curve
from .engine import Engine
from .selection import Scorer

GROUPS = 6
"""The most groups of a run to record, evenly spread; the others are skipped."""

NEURONS = 3
"""Neurons of each, the last to be removed."""

POINTS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Of each path; every one takes a pass, and straight lines between them are close to the curve."""


def recorded(index: int, groups: int, criterion: Criterion) -> bool:
    """Whether curves of a group are recorded, by its index; only with criteria that fade single neurons anyway."""
    if not isinstance(criterion, FadingCriterion) or criterion.path != "neuron":
        return False
    return groups <= GROUPS or index in {i * (groups - 1) // (GROUPS - 1) for i in range(GROUPS)}


def curve(scorer: Scorer, neuron: int, criterion: Criterion) -> Curve:
    """The curve of a neuron that is still there.

    Args:
        scorer: of the neuron's group, for a criterion that :func:`recorded` accepts.
        neuron: its index.
        criterion: that criterion.
    """
    assert isinstance(scorer, Engine) and isinstance(criterion, FadingCriterion)
    points = torch.tensor(POINTS, dtype=torch.float64)
    return Curve(neuron, POINTS, tuple(scorer.fading(neuron, points, criterion.p).tolist()))
