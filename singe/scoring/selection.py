"""Which neuron of a group to remove next."""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..criteria import Criterion

Refresh = Literal["lazy", "full"]


class Scorer(Protocol):
    """Computes the scores of a group's neurons while they are removed; an engine, for example."""

    @property
    def memory(self) -> int:
        """Bytes that its passes may take, so far as the device had room for them."""

    @property
    def forgets_alone(self) -> bool:
        """Whether ``forget`` is all that it needs of a removal; otherwise it reads the masked model."""

    def scores(self, criterion: Criterion, neurons: Tensor | None = None) -> Tensor:
        """float64 [len(neurons)] on the CPU."""

    def lasting(self, criterion: Criterion) -> bool:
        """Whether a score stays the same when others of the group are removed."""

    def forget(self, neuron: int) -> None:
        """Removes a neuron, after it has been masked in the model where that is read."""


class Selection:
    """Takes the least relevant neurons of a group one by one, re-scoring in between.

    A removal makes all scores stale, unless they last. ``"full"`` then scores all remaining neurons again. ``"lazy"``
    scores only the least until the least is up to date, which is exact as long as scores do not shrink when others are
    removed.

    Attributes:
        scorer: computes the scores; call its ``forget`` after a removal, or renew it after weights have changed.
        first_scores: of all neurons, before any was taken.
        taken: the neurons taken so far, in order; ``taken_scores`` their scores when they were taken.
        scored: how many neurons have been scored, repetitions included.
    """

    def __init__(self, scorer: Scorer, criterion: Criterion, refresh: Refresh) -> None:
        self.scorer = scorer
        self.taken: list[int] = []
        self.taken_scores: list[float] = []
        self._criterion = criterion
        self._lazy = refresh == "lazy" and not criterion.scores_together
        self._scores = scorer.scores(criterion)
        self.first_scores: tuple[float, ...] = tuple(self._scores.tolist())
        self._fresh = torch.ones_like(self._scores, dtype=torch.bool)
        self.scored = len(self._scores)

    def renew(self, scorer: Scorer) -> None:
        """Continues with another scorer, for the same group with other weights."""
        self.scorer = scorer
        self._fresh[:] = False

    def take_least(self) -> int:
        """The least relevant neuron left; the caller removes it from the model."""
        if not self._lazy and not bool(self._fresh.any()):
            self._score(self._scores.isfinite().nonzero().flatten())
        while True:
            neuron = int(self._scores.argmin())
            if self._fresh[neuron]:
                break
            self._score(torch.tensor([neuron]))
        self.taken.append(neuron)
        self.taken_scores.append(float(self._scores[neuron]))
        self._scores[neuron] = math.inf
        if not self.scorer.lasting(self._criterion):
            self._fresh[:] = False
        return neuron

    def _score(self, neurons: torch.Tensor) -> None:
        self._scores[neurons] = self.scorer.scores(self._criterion, neurons)
        self._fresh[neurons] = True
        self.scored += len(neurons)


def order(scorer: Scorer, criterion: Criterion) -> Tensor:
    """int64 [n]: a group's neurons, least relevant first, re-scored if that needs no removal in the model."""
    if not scorer.forgets_alone:
        return scorer.scores(criterion).argsort(stable=True)
    selection = Selection(scorer, criterion, "full")
    for _ in selection.first_scores:
        scorer.forget(selection.take_least())
    return torch.tensor(selection.taken)
