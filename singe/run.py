"""Algorithm 1 of the paper: group by group, the least relevant neuron goes, the rest is scored again."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from . import checks
from .allocation.latency_budget import Machine, counts_within
from .allocation.schedules import RANKINGS
from .allocation.sensitivity import SAMPLES, Sensitivity
from .bars import bar, standing
from .criteria import FeatureRelevance, Reconstruction
from .graph.groups import Group
from .graph.trace import Trace, named_tensors, trace
from .models.batches import Batch
from .models.isolation import same_modes, seed_everything
from .models.weightnorm import plain_copy, weight_norms, with_weight_norms, without_weight_norms
from .options import Options
from .ranks import ALONE, Ranks
from .records import Curve, GroupRecord
from .refit.compensation import Compensator
from .refit.equations import Unpruned
from .removal.plan import Plan
from .removal.surgery import compact, held_at_zero, mask
from .removal.trial import check_result
from .result import TIMED, PruneResult, compared, count_macs, count_parameters, spent, widths
from .scoring import curves
from .scoring.engine import Engine
from .scoring.reconstruction import Reconstructor
from .scoring.relevance import RelevanceScorer
from .scoring.scores import unscorable
from .scoring.selection import Scorer, Selection, order
from .storage.checkpoint import Checkpoint, Progress, fingerprint
from .storage.files import digest
from .survey import few, survey
from .timing.stopwatch import Stopwatch, timed
from .training.collapse import Watch
from .training.data import Stream
from .training.finetune import Tuner
from .training.recalibration import recalibrate, running_norms

log = logging.getLogger("singe")


_COMPARED, _MEASURED, _SERVED, _RANKED = (1 << 20) - 1, (1 << 20) - 2, (1 << 20) - 3, 1 << 19
"""The phases in which samples are drawn to compare networks, to measure their sensitivity and to time them on, and in
which ranking draws: behind all others."""


class Run:
    """One call of :func:`prune`: the working copy, what has been decided, and what has been done."""

    def __init__(self, model: nn.Module, stream: Stream, options: Options) -> None:
        self._given, self._stream, self._options, self._ranks = model, stream, options, options.ranks
        self._ranks.check_same("arguments", json.dumps(options.deciding(), default=str))
        self._norms = weight_norms(model)
        self._work = without_weight_norms(checks.copied(model))
        self._original = plain_copy(model) if self._norms else model
        self._still = [n for n, module in model.named_modules() if model.training and not module.training]
        self._todo: list[tuple[Group, int]] = []
        self._frozen: dict[str, str] = {}  # names of groups left whole -> why
        self._restart(0)
        self._probe = stream.take(options.images)
        checks.runs(self._work, self._probe, options.task)
        self._checkpoint = self._opened()
        resumed = self._resumed()
        self._resumes = resumed is not None
        self._progress = resumed or Progress(options.memory, fingerprint(self._probe))
        self._progress.memory = min(self._progress.memory, options.memory)
        with self._timed("analysis"):
            self._trace = self._traced(self._probe)
        checks.own_weights(model, self._trace)
        self._sample = few(self._probe, self._trace, options.task)
        self._watch = Watch(self._work, self._probe, options.task)
        if not math.isfinite(self._watch.loss):
            raise ValueError(f"expected a finite loss before pruning, got {self._watch.loss}")
        self._macs_before = count_macs(self._work, self._sample, self._options.task.call)
        compared = options.compensate != "none" or isinstance(options.criterion, Reconstruction)
        self._compared = self._drawn(options.compensation_images) if compared else None
        self._unpruned = self._as_it_is(self._original) if compared else None
        self._served = self._to_serve() if options.goal.target == "latency" else None

    # -- before the first removal ----------------------------------------------------------------------------

    def _resumed(self) -> Progress | None:
        """What there is to go on from, which all ranks have to see."""
        found = self._checkpoint.read() if self._checkpoint is not None else None
        told = "" if found is None else json.dumps(found.to_json())
        self._ranks.check_same("checkpoint, in a directory that all see,", told)
        return found

    def _opened(self) -> Checkpoint | None:
        if self._options.checkpoint is None:
            return None
        trained = [name for name, p in self._given.named_parameters() if p.requires_grad]
        model = digest(json.dumps([trained, self._still]), named_tensors(self._given))
        return Checkpoint(self._options.checkpoint, self._options.deciding() | {"model": model})

    def plan_widths(self, seconds: float) -> None:
        """Finds the groups that may be pruned and fixes how many neurons each will lose."""
        task, goal = self._options.task, self._options.goal
        left_whole = partial(goal.left_whole, self._original)
        with self._timed("analysis"):
            found = survey(self._work, self._trace, self._sample, task, left_whole, seconds, self._options.progress)
        able, self._frozen = found.able, found.frozen
        blind = unscorable(self._trace, able, self._options.criterion, self._probe)
        able, self._frozen = [g for g in able if g.name not in blind], self._frozen | blind
        for name, reason in self._frozen.items():
            log.info("%s is not pruned: %s", name, reason)
        if not able:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._frozen.items())
            raise ValueError(f"expected a model with neurons to prune, found none ({reasons or 'no layers'})")
        if not self._resumes:
            with self._timed("ranking"):
                counts = self._counts(able)
            self._progress.widths = [(g.name, g.size, n) for g, n in zip(able, counts, strict=True) if n]
        groups = {(g.name, g.size): g for g in able}
        other = [name for name, size, _ in self._progress.widths if (name, size) not in groups]
        if other:
            raise ValueError(f"expected the groups of the checkpoint in the model, found none like {', '.join(other)}")
        self._todo = [(groups[name, size], count) for name, size, count in self._progress.widths]
        if not self._todo:
            log.warning("nothing is removed: rho=%g is less than half of the smallest step", goal.rho)

    def _counts(self, groups: Sequence[Group]) -> list[int]:
        """How many neurons each group will lose: what the first rank says, where the clock decides."""
        goal, task = self._options.goal, self._options.task
        if self._served is None:
            return goal.counts(self._original, groups, self._trace, self._macs_before, lambda: self._ranking(groups))
        ranking = self._ranking(groups) if goal.allocation in RANKINGS else []
        counts = [0] * len(groups)
        if self._ranks.first:  # the others wait, and disturb no measurement
            machine = Machine(self._given, groups, self._served, task)
            counts = counts_within(goal, self._original, groups, machine, lambda: ranking)
        return self._ranks.from_first(torch.tensor(counts)).tolist()

    def _ranking(self, groups: Sequence[Group]) -> list[Tensor]:
        """What ranks every neuron of the unpruned network among all: its score, or what the loss makes of its group.

        Each rank looks at some of the groups.
        """
        measured = self._sensitivity() if self._options.goal.allocation == "sensitivity" else None
        before = None if self._unpruned is None else (self._unpruned, self._progress.plan)
        values = [torch.zeros(g.size, dtype=torch.float64) for g in groups]
        own = range(self._ranks.rank, len(groups), self._ranks.size)
        with bar(own, desc="ranking", unit="group", shown=self._options.progress) as shown:
            for index in shown:
                seed_everything((self._options.seed << 20) + _RANKED + index)
                group, criterion = groups[index], self._options.criterion
                scorer = self._engine(group, self._probe, before, ALONE)
                values[index] = (
                    scorer.scores(criterion) if measured is None else measured.prices(group, order(scorer, criterion))
                )
        return list(self._ranks.sum(torch.cat(values)).split([g.size for g in groups]))

    def _sensitivity(self) -> Sensitivity:
        o, graph = self._options, self._trace
        size = o.images if graph.dynamic else graph.example_batch
        self._restart(_MEASURED)
        batches = [self._stream.take(size) for _ in range(-(-SAMPLES // size))]
        few = None if o.compensate == "none" else self._drawn(min(o.compensation_images, SAMPLES))
        unpruned = None if few is None else Unpruned(self._work, graph, few, o.task, o.memory)
        compensator = None if unpruned is None else Compensator(unpruned, o.compensate)
        return Sensitivity(self._work, graph, batches, o.task, compensator)

    # -- the run ---------------------------------------------------------------------------------------------

    def execute(self) -> PruneResult:
        """Prunes group after group."""
        neurons = sum(n for _, n in self._todo)
        tuner, progress = self._tuner(neurons), self._progress
        self._evaluation_before = self._evaluation()
        if self._resumes:
            self._resume(tuner)
        elif self._checkpoint is not None and self._ranks.first:  # what cannot be written is found out before any work
            self._checkpoint.write(progress, self._work, None)
        for record in progress.history:
            self._options.observer.tell(record)
        done, total = len(progress.history), len(self._todo)
        with bar(desc="pruning", initial=done, total=total, unit="group", shown=self._options.progress) as shown:
            for index, (group, count) in enumerate(self._todo[done:], done):
                record = self._prune_group(index, group, count, tuner)
                progress.history.append(record)
                self._agree(record)
                self._save(tuner)
                shown.set_postfix(standing(record.loss_end, record.evaluation), refresh=False)
                shown.update()
                self._options.observer.tell(record)
        if self._refits_all and not progress.tuned:
            self._refit_all()
        if tuner is not None and tuner.when == "after" and not progress.tuned:
            self._restart(len(self._todo))
            with self._timed("fine-tuning"):
                tuner.pause()
            self._ranks.synchronise(named_tensors(self._work))
            progress.tuned = True
            self._save(tuner)
        if self._options.recalibrate_bn:
            self._restart(len(self._todo) + 1)
            with self._timed("recalibrating"):
                recalibrate(self._work, self._stream, self._options.task, self._options.recalibrate_bn, self._still)
            self._ranks.synchronise(named_tensors(self._work))
        return self._result()

    @property
    def _refits_all(self) -> bool:
        """Whether all layers are refitted behind the last group: not where training in between has led away."""
        tuned = self._options.finetune
        return self._options.compensate == "least_squares" and (tuned is None or tuned.when == "after")

    def _refit_all(self) -> None:
        """Refits all layers once more, now that all groups are pruned."""
        assert self._unpruned is not None and self._compared is not None
        self._follow(self._compared, len(self._todo))
        with self._timed("compensating"):
            compensator = Compensator(self._unpruned, self._options.compensate)
            self._progress.uncompensated = compensator.refit_all(self._work, self._trace, self._progress.plan)
        self._ranks.synchronise(named_tensors(self._work))

    def _agree(self, record: GroupRecord) -> None:
        """Ends the run where ranks have come apart; what they have rounded differently becomes the same again."""
        self._ranks.check_decision(record.group, {"removed": torch.tensor(record.removed)})
        self._ranks.synchronise(named_tensors(self._work))

    def _resume(self, tuner: Tuner | None) -> None:
        """Puts everything where the checkpoint says that it was."""
        assert self._checkpoint is not None
        progress, optimizer = self._progress, tuner.optimizer if tuner is not None else None
        if fingerprint(self._probe) != progress.samples:
            log.warning("the loader's first samples are not what they were: the run may come to something else")
        if progress.traced:  # the graph is that of a network of the same widths as then
            then = Plan(progress.plan.removals[: progress.traced]).apply(copy.deepcopy(self._work))
            self._trace = trace(then, self._options.task.inputs(self._probe), self._options.task.call)
        compact(self._work, progress.plan.removed(), optimizer)
        self._checkpoint.restore(self._work, optimizer)
        if tuner is not None:
            pauses = {"layer": len(progress.history), "neuron": progress.neurons, "after": int(progress.tuned)}
            tuner.resume(pauses[tuner.when])
        log.info("the run goes on behind %d of %d groups", len(progress.history), len(self._todo))

    def _save(self, tuner: Tuner | None) -> None:
        """Leaves a checkpoint, if asked to; a run does not end for want of room on a disk."""
        if self._checkpoint is None or not self._ranks.first:
            return
        try:
            self._checkpoint.write(self._progress, self._work, tuner.optimizer if tuner is not None else None)
        except OSError as error:
            log.warning("no checkpoint behind %s, the last one stays: %s", self._progress.history[-1].group, error)

    def rehearse(self) -> None:
        """Refuses a loader that batch norms cannot be recalibrated on before any work."""
        if self._options.recalibrate_bn and running_norms(self._work, self._still):
            recalibrate(copy.deepcopy(self._work), self._stream, self._options.task, 1, self._still)

    def _tuner(self, neurons: int) -> Tuner | None:
        if self._options.finetune is None:
            return None
        pauses = {"layer": len(self._todo), "neuron": neurons, "after": 1}[self._options.finetune.when]
        tuner = Tuner(
            self._options.finetune, self._work, self._stream, self._options.task, pauses, self._still,
            unpruned=self._original, progress=self._options.progress, ranks=self._ranks,
        )  # fmt: skip
        tuner.rehearse()
        return tuner

    def _drawn(self, images: int) -> Batch:
        """At least so many samples to compare networks on, in batches that the graph takes."""
        self._restart(_COMPARED)
        step = 1 if self._trace.dynamic else self._trace.example_batch
        return self._stream.take(-(-images // step) * step)

    def _to_serve(self) -> Batch:
        """What networks are timed on where their latency is to go, of as many samples as asked for."""
        self._restart(_SERVED)
        batch = self._stream.take(self._options.goal.latency_batch)
        checks.answers(self._work, batch, self._options.task)
        return batch

    def _as_it_is(self, model: nn.Module) -> Unpruned:
        """What pruned networks are compared with: ``model``, of which the trace is one."""
        o = self._options
        return Unpruned(model, self._trace, self._compared, o.task, o.memory)

    def _prune_group(self, index: int, group: Group, count: int, tuner: Tuner | None) -> GroupRecord:
        self._restart(index)
        batch = self._stream.take(self._options.images)
        current = self._progress.plan.rebase(group)
        self._follow(batch, index)
        optimizer = tuner.optimizer if tuner is not None else None
        scoring, compensating, tuning = Stopwatch(), Stopwatch(), Stopwatch()
        here = Plan()
        before = self._before(tuner, here)
        with scoring:
            selection = Selection(self._engine(current, batch, before), self._options.criterion, self._options.refresh)
        loss_start = selection.engine.loss
        renewed = partial(self._engine, current, batch, before)
        shown = self._remove(index, current, count, selection, renewed, tuner, scoring, tuning)
        loss_removed = self._evaluate(batch)
        here.add(current, selection.taken)
        compact(self._work, here.removed(), optimizer)
        self._progress.plan.add(group, selection.taken)
        uncompensated: dict[str, str] = {}
        if before is not None and self._options.compensate != "none":
            self._follow(batch, index + 1)
            with compensating:
                network, gone = before
                compensator = Compensator(network, self._options.compensate)
                uncompensated = compensator.refit(self._work, self._trace, current, gone)
        if tuner is not None and tuner.when == "layer":
            with tuning:
                tuner.pause()
        return GroupRecord(
            group=group.name, size=group.size, removed=tuple(selection.taken), scores=tuple(selection.taken_scores),
            neurons_scored=selection.scored, loss_start=loss_start, loss_removed=loss_removed,
            loss_end=self._evaluate(batch), seconds_scoring=scoring.seconds,
            seconds_compensating=compensating.seconds, seconds_tuning=tuning.seconds, uncompensated=uncompensated,
            first_scores=selection.first_scores, curves=shown, evaluation=self._evaluation(),
        )  # fmt: skip

    def _remove(
        self, index: int, group: Group, count: int, selection: Selection, renewed: Callable[[], Scorer],
        tuner: Tuner | None, scoring: Stopwatch, tuning: Stopwatch,
    ) -> tuple[Curve, ...]:  # fmt: skip
        """Masks the least relevant neurons of a group one by one; returns curves of the last, where they are wanted."""
        criterion, optimizer = self._options.criterion, tuner.optimizer if tuner is not None else None
        wanted = curves.recorded(index, len(self._todo), criterion)
        found: tuple[Curve, ...] = ()
        shown = self._options.progress
        with bar(range(count), desc=group.name, unit="neuron", shown=shown, inside=True) as turns:
            for turn in turns:
                with scoring:
                    neuron = selection.take_least()
                if wanted and turn >= count - curves.NEURONS:
                    with self._timed("fading curves"):
                        found += (curves.curve(selection.engine, neuron, criterion),)
                self._progress.memory = selection.engine.memory
                mask(self._work, group.slices, torch.tensor([neuron]), optimizer)
                if tuner is not None and tuner.when == "neuron":
                    gone = torch.tensor(selection.taken)
                    with tuning, held_at_zero(self._work, group.slices, gone, tuner.optimizer):
                        tuner.pause()
                    with scoring:
                        selection.renew(renewed())
                else:
                    selection.engine.forget(neuron)
        return found

    def _result(self) -> PruneResult:
        plan, history = self._progress.plan, self._progress.history
        with_weight_norms(self._work, self._norms)
        check_result(self._original, self._work, plan, self._sample, self._options.task.call)
        loss_after = self._watch.loss_after(self._work)
        macs_after = count_macs(self._work, self._sample, self._options.task.call)
        evaluation_after = self._evaluation()
        with self._timed("latency"):
            task = self._options.task
            served = self._served
            samples = few(self._probe, self._trace, task, TIMED) if served is None else task.inputs(served)
            latency = compared(self._given, self._work, samples, task) if self._ranks.first else None
            self._ranks.wait()  # so that nothing disturbs the measurement
        same_modes(self._work, self._given)
        return PruneResult(
            model=self._work, plan=plan,
            params_before=count_parameters(self._given), params_after=count_parameters(self._work),
            macs_before=self._macs_before, macs_after=macs_after,
            loss_before=self._watch.loss, loss_after=loss_after, history=history, frozen=self._frozen,
            uncompensated=self._progress.uncompensated,
            evaluation_before=self._evaluation_before, evaluation_after=evaluation_after, latency=latency,
            widths=widths(self._given, self._work), settings=self._options.described(checks.device_of(self._work)),
            seconds=spent(self._progress.seconds, history),
        )  # fmt: skip

    def _timed(self, what: str) -> AbstractContextManager[None]:
        return timed(self._progress.seconds, what)

    def _evaluation(self) -> float | None:
        with self._timed("evaluate"):
            return self._ranks.number(self._options.observer.evaluation(self._work))

    def _evaluate(self, batch: Batch) -> float:
        with torch.no_grad():
            return self._options.task(self._work, batch).item()

    def _restart(self, phase: int) -> None:
        """Begins a new epoch; no two phases of any two seeds below 4096 see the same."""
        self._stream.restart((self._options.seed << 20) + phase)

    def _follow(self, batch: Batch, done: int) -> None:
        """Exports the network anew where the graph no longer is that network, as cutting it may have it."""
        with self._timed("analysis"):
            if not self._trace.holds_for(self._work, self._sample):
                self._trace, self._progress.traced = self._traced(batch), done

    def _before(self, tuner: Tuner | None, here: Plan) -> tuple[Unpruned, Plan] | None:
        """What the readers of a group are to go on like, and what of that is gone, or will be.

        The unpruned network; or, where training in between has led away from it, the network as it is before the group.

        Args:
            tuner: of the run.
            here: what of the group goes.
        """
        if self._unpruned is None:
            return None
        if tuner is None or tuner.when == "after":
            return self._unpruned, self._progress.plan
        return self._as_it_is(copy.deepcopy(self._work)), here

    def _engine(
        self, group: Group, batch: Batch, before: tuple[Unpruned, Plan] | None, ranks: Ranks | None = None
    ) -> Scorer:
        """What scores a group on a batch; by all ranks together, or by those given."""
        o, ranks = self._options, ranks or self._ranks
        if isinstance(o.criterion, Reconstruction):
            assert before is not None
            network, gone = before
            memory, loss = self._progress.memory, self._evaluate(batch)
            return Reconstructor(self._work, self._trace, group, network, gone.removed(), loss, memory)
        if isinstance(o.criterion, FeatureRelevance):
            return RelevanceScorer(self._work, self._trace, group, batch, o.task, self._progress.memory)
        return Engine(self._work, self._trace, group, batch, o.task, self._progress.memory, o.precision, ranks)

    def _traced(self, batch: Batch) -> Trace:
        task = self._options.task
        return trace(self._work, task.inputs(batch), task.call)
