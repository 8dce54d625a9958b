"""Algorithm 1 of the paper on single weights: layer by layer, the least relevant are masked; fine-tuning between.

All weights of a layer that go are chosen in one round: the path fades the whole layer, so that one pass at each node
scores all its weights.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import checks
from .allocation.cost import WeightCost
from .allocation.goal import ignored
from .bars import bar, standing
from .graph.trace import named_tensors, trace
from .models.batches import Batch
from .models.isolation import same_modes
from .models.numerics import alike
from .options import Options
from .records import WeightRecord
from .removal import masks
from .removal.weights import Weight, find_weights
from .result import count_parameters, spent
from .scoring.elementwise import WeightScorer
from .sparse import SparseResult
from .survey import few
from .timing.stopwatch import Stopwatch, timed
from .training.collapse import Watch
from .training.data import Stream
from .training.finetune import Tuner
from .training.recalibration import recalibrate, running_norms

log = logging.getLogger("singe")


class UnstructuredRun:
    """One call of :func:`prune` for single weights: the working copy, what has been decided, and what has been done.

    The copy holds zeros in plain parameters while it is worked on; masks are put on at the end.
    """

    def __init__(self, model: nn.Module, stream: Stream, options: Options) -> None:
        self._given, self._stream, self._options, self._ranks = model, stream, options, options.ranks
        self._ranks.check_same("arguments", json.dumps(options.deciding(), default=str))
        self._work = checks.copied(model)
        self._still = [n for n, module in model.named_modules() if model.training and not module.training]
        self._memory = options.memory
        self._seconds: dict[str, float] = {}  # what went into what else than the tensors
        self._todo: list[tuple[Weight, int]] = []
        self._frozen: dict[str, str] = {}  # names of weights left whole -> why
        self._kept: dict[str, Tensor] = {}
        self._restart(0)
        self._probe = stream.take(options.images)
        checks.runs(self._work, self._probe, options.task)
        with timed(self._seconds, "analysis"):
            self._trace = trace(self._work, options.task.inputs(self._probe), options.task.call)
        checks.own_weights(model, self._trace)
        self._sample = few(self._probe, self._trace, options.task)
        self._watch = Watch(self._work, self._probe, options.task)
        if not math.isfinite(self._watch.loss):
            raise ValueError(f"expected a finite loss before pruning, got {self._watch.loss}")
        self._weights = find_weights(self._trace, self._work)

    def rehearse(self) -> None:
        """Refuses a loader that batch norms cannot be recalibrated on before any work."""
        if self._options.recalibrate_bn and running_norms(self._work, self._still):
            recalibrate(copy.deepcopy(self._work), self._stream, self._options.task, 1, self._still)

    def plan_shares(self) -> None:
        """Finds the weights that may be pruned and fixes how many single ones each will lose."""
        goal, task, able = self._options.goal, self._options.task, self._weights.plain
        whole = self._weights.other | {w.name: "is a single weight" for w in able if w.size == 1}
        whole |= ignored(self._given, able, goal.ignore)
        able = [w for w in able if w.name not in whole]
        whole |= masks.unmaskable(self._work, [w.name for w in able], self._sample, task.call)
        able = [w for w in able if w.name not in whole]
        whole |= goal.without_share(self._given, able)
        able, self._frozen = [w for w in able if w.name not in whole], whole
        for name, reason in whole.items():
            log.info("%s is not pruned: %s", name, reason)
        if not able:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in whole.items())
            raise ValueError(f"expected a model with weights to prune, found none ({reasons or 'no layers'})")
        cost, choices = WeightCost(self._weights.total), [range(w.size) for w in able]
        with timed(self._seconds, "ranking"):
            counts = goal.fitted(self._given, able, cost, choices, lambda: self._first_scores(able))
        self._todo = [(weight, count) for weight, count in zip(able, counts, strict=True) if count]
        if not self._todo:
            log.warning("nothing is removed: rho=%g is less than half a weight", goal.rho)

    def execute(self) -> SparseResult:
        """Prunes weight after weight."""
        tuner, history = self._tuner(), list[WeightRecord]()
        self._evaluation_before = self._evaluation()
        with bar(desc="pruning", total=len(self._todo), unit="layer", shown=self._options.progress) as shown:
            for index, (weight, count) in enumerate(self._todo):
                record = self._prune_weight(index, weight, count, tuner)
                history.append(record)
                shown.set_postfix(standing(record.loss_end, record.evaluation), refresh=False)
                shown.update()
                self._options.observer.tell(record)
        if tuner is not None and tuner.when == "after":
            self._restart(len(self._todo))
            with timed(self._seconds, "fine-tuning"):
                tuner.pause()
        if self._options.recalibrate_bn:
            self._restart(len(self._todo) + 1)
            with timed(self._seconds, "recalibrating"):
                recalibrate(self._work, self._stream, self._options.task, self._options.recalibrate_bn, self._still)
            self._ranks.synchronise(named_tensors(self._work))
        return self._result(history)

    def _tuner(self) -> Tuner | None:
        plan, task = self._options.finetune, self._options.task
        if plan is None:
            return None
        pauses = len(self._todo) if plan.when == "layer" else 1
        tuner = Tuner(
            plan, self._work, self._stream, task, pauses, self._still, unpruned=self._given,
            progress=self._options.progress, ranks=self._ranks,
        )  # fmt: skip
        tuner.rehearse()
        # no gradient, momentum or decay moves what is masked
        tuner.optimizer.register_step_post_hook(lambda *_: self._hold(tuner))
        return tuner

    def _prune_weight(self, index: int, weight: Weight, count: int, tuner: Tuner | None) -> WeightRecord:
        self._restart(index)
        batch = self._stream.take(self._options.images)
        scoring, tuning = Stopwatch(), Stopwatch()
        loss_start = self._evaluate(batch)
        with scoring:
            scores = self._scores(weight, batch)
            self._kept[weight.name] = without_least(scores, count)
        self._ranks.check_decision(weight.name, {"kept": self._kept[weight.name]})
        self._hold(tuner)
        loss_removed = loss_end = self._evaluate(batch)
        if tuner is not None and tuner.when == "layer":
            with tuning:
                tuner.pause()
            loss_end = self._evaluate(batch)
        return WeightRecord(
            weight=weight.name, size=weight.size, removed=count, loss_start=loss_start, loss_removed=loss_removed,
            loss_end=loss_end, seconds_scoring=scoring.seconds, seconds_tuning=tuning.seconds,
            evaluation=self._evaluation(),
        )  # fmt: skip

    def _hold(self, tuner: Tuner | None) -> None:
        """Zeroes what is masked."""
        for name, kept in self._kept.items():
            masks.zero(self._work.get_parameter(name), kept, None if tuner is None else tuner.optimizer)

    def _first_scores(self, weights: Sequence[Weight]) -> list[Tensor]:
        """Every weight's scores in the unpruned network, on one batch."""
        with bar(weights, desc="ranking", unit="layer", shown=self._options.progress) as shown:
            return [self._scores(weight, self._probe).flatten().cpu() for weight in shown]

    def _scores(self, weight: Weight, batch: Batch) -> Tensor:
        o = self._options
        scorer = WeightScorer(
            self._work, self._trace, weight.name, batch, o.task, self._memory, o.precision, self._ranks
        )  # fmt: skip
        scores = scorer.scores(o.criterion)
        self._memory = scorer.memory
        return scores

    def _result(self, history: list[WeightRecord]) -> SparseResult:
        task = self._options.task
        loss_after, evaluation_after = self._watch.loss_after(self._work), self._evaluation()
        with torch.no_grad():
            expected = task.outputs(self._work, self._probe)
            masks.put_on(self._work, self._kept)
            if not alike(task.outputs(self._work, self._probe), expected):
                raise RuntimeError("the masked network is not the one with zeros; please report this model")
        same_modes(self._work, self._given)
        removed = sum(record.removed for record in history)
        parameters = count_parameters(self._given)
        return SparseResult(
            model=self._work, masks=self._kept,
            weights_before=self._weights.total, weights_after=self._weights.total - removed,
            params_before=parameters, params_after=parameters - removed,
            loss_before=self._watch.loss, loss_after=loss_after, history=history, frozen=self._frozen,
            evaluation_before=self._evaluation_before, evaluation_after=evaluation_after,
            settings=self._options.described(checks.device_of(self._work)), seconds=spent(self._seconds, history),
        )  # fmt: skip

    def _evaluation(self) -> float | None:
        with timed(self._seconds, "evaluate"):
            return self._ranks.number(self._options.observer.evaluation(self._work))

    def _evaluate(self, batch: Batch) -> float:
        with torch.no_grad():
            loss = self._options.task(self._work, batch).item()
        if not math.isfinite(loss):
            raise ValueError(f"expected a finite loss on the batch, got {loss}")
        return loss

    def _restart(self, phase: int) -> None:
        """Begins a new epoch; no two phases of any two seeds below 4096 see the same."""
        self._stream.restart((self._options.seed << 20) + phase)


def without_least(scores: Tensor, count: int) -> Tensor:
    """A mask, bool of the shape of ``scores``, without the ``count`` smallest; of equal ones the first go."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(stable=True)[:count]] = False
    return kept.view(scores.shape)
