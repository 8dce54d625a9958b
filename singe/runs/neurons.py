"""Algorithm 1 of the paper: group by group, the least relevant neuron is removed, and the rest are scored again."""

from __future__ import annotations

import logging
from dataclasses import astuple

import torch
from torch import nn

from .. import checks
from ..bars import bar
from ..graph.groups import Group
from ..graph.trace import trace
from ..models.batches import length
from ..models.copies import copy_of
from ..models.weightnorm import with_weight_norms
from ..records import GroupRecord
from ..refit.compensation import Compensator
from ..removal.plan import Plan
from ..removal.surgery import compact
from ..removal.trial import check_result
from ..result import TIMED, LatencyChange, PruneResult, compared, spent
from ..sizes import count_parameters, widths
from ..storage.progress import NeuronProgress
from ..survey import sample_inputs
from ..timing.latency import Latency
from ..training.data import Stream
from ..training.finetune import When
from .counts import able_groups, counts
from .group import Turn
from .neuron_workspace import NeuronWorkspace
from .options import Options
from .run import Run

log = logging.getLogger("singe")


class NeuronRun(Run):
    """A run on neurons: ``todo`` are the groups that lose some, decided by :meth:`plan_widths`."""

    kind, structured = NeuronProgress, True
    space: NeuronWorkspace
    todo: list[tuple[Group, int]]

    def __init__(self, model: nn.Module, stream: Stream, options: Options) -> None:
        super().__init__(NeuronWorkspace(model, stream, options))

    # -- before the first removal ----------------------------------------------------------------------------

    def rehearse(self) -> None:
        """See :meth:`Workspace.rehearse`."""
        self.space.rehearse(self.space.original, lambda: self.space.progress.plan.removed())

    def plan_widths(self, seconds: float) -> None:
        """Finds the groups that may be pruned and fixes how many neurons each will lose."""
        space, progress = self.space, self.space.progress
        able, self.frozen = able_groups(space, seconds)
        if not self.resumes:
            with space.timed("ranking"):
                found = counts(space, able, self.frozen)
            progress.counts = [(g.name, g.size, n) for g, n in zip(able, found, strict=True) if n]
        self.todo = self.decided({(group.name, group.size): group for group in able})
        if not self.todo:
            log.warning("nothing is removed: rho=%g is less than half of the smallest step", space.options.goal.rho)

    # -- the run ---------------------------------------------------------------------------------------------

    def execute(self) -> PruneResult[GroupRecord]:
        """Prunes group after group."""
        space, progress = self.space, self.space.progress
        tuner = space.tuner
        self._begin()
        if tuner is not None:
            tuner.begin(*self._stages(tuner.when), progress.tuned)
        self._prune_groups()
        if self.refits_all and not progress.tuned:
            self._refit_all()
        self._tune_after()
        space.recalibrate(len(self.todo) + 1)
        return self._result()

    def _stages(self, when: When) -> tuple[int, int]:
        """How many stages fine-tuning has in all, and how many are done."""
        progress = self.space.progress
        return {
            "layer": (len(self.todo), len(progress.history)),
            "neuron": (sum(count for _, count in self.todo), progress.neurons),
            "after": (1, 0),
        }[when]

    def resume(self) -> None:
        """Cuts the model and exports it as it was, before its values are read."""
        assert self._checkpoint is not None
        space, progress = self.space, self.space.progress
        if progress.traced:  # the graph is that of a network of the same widths as then
            then = Plan(progress.plan.removals[: progress.traced]).apply(copy_of(space.model))
            space.trace = trace(then, space.options.task.inputs(space.probe), space.options.task.call)
        compact(space.model, progress.plan.removed(), self._optimizer)
        self._checkpoint.restore(space.model, self._optimizer)
        super().resume()

    def _prune_groups(self) -> None:
        """Prunes those that are not done."""
        space, history = self.space, self.space.progress.history
        done, total, progress = len(history), len(self.todo), space.options.progress
        with bar(desc="pruning", initial=done, total=total, unit="group", shown=progress) as shown:
            for index, (group, count) in enumerate(self.todo[done:], done):
                record = Turn(space, index, group, count, space.tuner).take()
                history.append(record)
                self._agree(record)
                self._save()
                size, left = record.size, record.size - len(record.removed)
                space.tell(record, shown, f"group {index + 1} of {total}: {record.group} {size} -> {left}")

    def _agree(self, record: GroupRecord) -> None:
        """Ends the run if ranks have removed different neurons; values rounded differently become the same again."""
        self.space.ranks.check_decision(record.group, {"removed": torch.tensor(record.removed)})
        self.space.synchronise()

    @property
    def refits_all(self) -> bool:
        """Whether all layers are refitted after the last group: not where there was training in between."""
        options = self.space.options
        return options.compensate == "least_squares" and (options.finetune is None or options.finetune.when == "after")

    def _refit_all(self) -> None:
        """Refits all layers once more, now that all groups are pruned."""
        space = self.space
        assert space.wanted is not None and space.compared is not None
        space.follow(space.compared, len(self.todo))
        with space.timed("compensating"):
            compensator = Compensator(space.wanted, space.options.compensate)
            space.progress.uncompensated = compensator.refit_all(space.model, space.trace)
        space.synchronise()

    # -- the end ---------------------------------------------------------------------------------------------

    def _result(self) -> PruneResult[GroupRecord]:
        space, progress, call = self.space, self.space.progress, self.space.options.task.call
        with_weight_norms(space.model, space.norms)
        check_result(space.original, space.model, progress.plan, space.sample, call)
        loss_after = space.loss_after()
        macs_after = space.macs_of(space.model)
        evaluation_after = space.evaluation()
        latency = self._latency()
        space.finish()
        return PruneResult(
            model=space.model, plan=progress.plan,
            params_before=count_parameters(space.given), params_after=count_parameters(space.model),
            macs_before=space.macs, macs_after=macs_after,
            loss_before=space.watch.loss, loss_after=loss_after, history=progress.history, frozen=self.frozen,
            uncompensated=progress.uncompensated,
            evaluation_before=space.evaluation_before, evaluation_after=evaluation_after, latency=latency,
            widths=widths(space.given, space.model),
            settings=space.options.described(checks.device_of(space.model)),
            seconds=spent(progress.seconds, progress.history),
        )  # fmt: skip

    def _latency(self) -> LatencyChange:
        """How long a forward pass took before and takes now, as the first rank measures it."""
        space, task = self.space, self.space.options.task
        with space.timed("latency"):
            served = space.served
            x = sample_inputs(space.probe, space.trace, task, TIMED) if served is None else task.inputs(served)
            found = torch.zeros(2, 4, dtype=torch.float64)
            if space.ranks.first:  # the others wait, and disturb no measurement
                change = compared(space.given, space.model, x, task)
                found = torch.tensor([astuple(change.before), astuple(change.after)], dtype=torch.float64)
            found = space.ranks.from_first(found)
        before, after = (Latency(median, low, high, int(n)) for median, low, high, n in found.tolist())
        return LatencyChange(before, after, length(x))
