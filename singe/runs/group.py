"""One group's turn: its neurons are removed one by one, its readers refitted, and the network trained in between."""

from __future__ import annotations

import logging

import torch

from ..bars import bar
from ..graph.groups import Group
from ..models.copies import copy_of
from ..records import Curve, GroupRecord
from ..refit.compensation import Compensator
from ..refit.equations import Wanted
from ..removal.plan import Plan
from ..removal.surgery import compact, held_at_zero, mask
from ..scoring import curves
from ..scoring.selection import Scorer, Selection
from ..timing.stopwatch import Stopwatch
from ..training.finetune import Tuner
from .neuron_workspace import NeuronWorkspace

log = logging.getLogger("singe")


class Turn:
    """The turn of a group, in a run that has begun.

    Args:
        space: of the run.
        index: of the group among those that lose neurons.
        group: as it is in the unpruned network.
        count: how many neurons it loses.
        tuner: trains the network in between, or after all groups.
    """

    def __init__(self, space: NeuronWorkspace, index: int, group: Group, count: int, tuner: Tuner | None) -> None:
        self._space, self._index, self._given, self._count, self._tuner = space, index, group, count, tuner
        self._when = None if tuner is None else tuner.when
        self._optimizer = None if tuner is None else tuner.optimizer
        self._scoring, self._compensating, self._tuning = Stopwatch(), Stopwatch(), Stopwatch()
        space.restart(index)
        self._batch = space.stream.take(space.options.images)
        self._group = space.progress.plan.rebase(group)
        space.follow(self._batch, index)
        self._here = Plan()  # what is removed of the group
        self._wanted = self._compared_with()

    def _compared_with(self) -> Wanted | None:
        """The values that the readers of the group are to have.

        Those of the unpruned network; where there is training in between, of the network before the group is pruned.
        """
        space = self._space
        if space.wanted is None or self._when in (None, "after"):
            return space.wanted
        return space.wanted_of(copy_of(space.model), self._here)

    def take(self) -> GroupRecord:
        """Prunes the group."""
        space = self._space
        loss_start = space.finite_loss(self._batch, self._given.name)
        with self._scoring:
            selection = Selection(self._scorer(), space.options.criterion, space.options.refresh)
        if not any(selection.first_scores):
            log.warning("every score of %s is 0: nothing that the criterion sees depends on it", self._given.name)
        shown = self._remove(selection)
        loss_removed = space.loss(self._batch)
        self._cut(selection.taken)
        uncompensated = self._refit()
        if self._when == "layer":
            self._tune()
        changed = self._when == "layer" or self._space.options.compensate != "none"
        return GroupRecord(
            group=self._given.name, size=self._given.size, removed=tuple(selection.taken),
            scores=tuple(selection.taken_scores), neurons_scored=selection.scored,
            loss_start=loss_start, loss_removed=loss_removed,
            loss_end=space.loss(self._batch) if changed else loss_removed,
            seconds_scoring=self._scoring.seconds, seconds_compensating=self._compensating.seconds,
            seconds_tuning=self._tuning.seconds, uncompensated=uncompensated,
            first_scores=selection.first_scores, curves=shown, evaluation=space.evaluation(),
        )  # fmt: skip

    def _scorer(self) -> Scorer:
        return self._space.scorer(self._group, self._batch, self._wanted)

    def _remove(self, selection: Selection) -> tuple[Curve, ...]:
        """Masks the least relevant neurons one by one; returns curves of the last, where they are wanted."""
        space, criterion = self._space, self._space.options.criterion
        found: tuple[Curve, ...] = ()
        wanted = curves.recorded(self._index, len(space.progress.counts), criterion)
        shown = space.options.progress
        with bar(range(self._count), desc=self._group.name, unit="neuron", shown=shown, inside=True) as turns:
            for turn in turns:
                with self._scoring:
                    neuron = selection.take_least()
                if wanted and turn >= self._count - curves.NEURONS:
                    with space.timed("fading curves"):
                        found += (curves.curve(selection.scorer, neuron, criterion),)
                space.progress.memory = min(space.progress.memory, selection.scorer.memory)
                mask(space.model, self._group.slices, torch.tensor([neuron]), self._optimizer)
                if self._when == "neuron":
                    self._tune_masked(selection)
                else:
                    selection.scorer.forget(neuron)
        return found

    def _tune_masked(self, selection: Selection) -> None:
        """Trains the network with masked weights held at zero, then replaces the scores, since weights have changed."""
        assert self._tuner is not None
        gone = torch.tensor(selection.taken)
        with held_at_zero(self._space.model, self._group.slices, gone, self._tuner.optimizer):
            self._tune()
        with self._scoring:
            selection.renew(self._scorer())

    def _tune(self) -> None:
        assert self._tuner is not None
        with self._tuning:
            self._tuner.train_stage()

    def _cut(self, neurons: list[int]) -> None:
        """Cuts the masked neurons out of the tensors."""
        self._here.add(self._group, neurons)
        compact(self._space.model, self._here.removed(), self._optimizer)
        self._space.progress.plan.add(self._given, neurons)

    def _refit(self) -> dict[str, str]:
        """Refits the readers, if asked to; returns those that could not be -> why."""
        space = self._space
        if self._wanted is None or space.options.compensate == "none":
            return {}
        space.follow(self._batch, self._index + 1)
        with self._compensating:
            compensator = Compensator(self._wanted, space.options.compensate)
            return compensator.refit(space.model, space.trace, self._group)
