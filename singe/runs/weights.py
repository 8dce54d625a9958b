"""Algorithm 1 of the paper on single weights: layer by layer, the least relevant are masked; with fine-tuning.

All weights to mask in a layer are chosen in one round: the path fades the whole layer, so that one pass at each node
scores all its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import checks
from ..allocation.cost import WeightCost
from ..allocation.fit import most
from ..allocation.goal import ignored
from ..bars import bar
from ..graph.trace import answer
from ..graph.weights import Weight, find_weights
from ..models.batches import Batch
from ..models.numerics import alike
from ..records import WeightRecord
from ..removal import masks
from ..result import spent
from ..scoring.elementwise import WeightScorer
from ..sizes import count_parameters
from ..sparse import SparseResult
from ..storage.progress import WeightProgress
from ..timing.stopwatch import Stopwatch
from ..training.data import Stream
from .options import Options
from .run import Run
from .workspace import Workspace

log = logging.getLogger("singe")


class WeightRun(Run):
    """A run on single weights: ``todo`` are the tensors that lose some, decided by :meth:`plan_shares`.

    The copy holds zeros in plain parameters while it is worked on; masks are put on at the end.

    Attributes:
        weights: all weight tensors, and the names of those that cannot be pruned.
    """

    kind, structured = WeightProgress, False
    todo: list[tuple[Weight, int]]

    def __init__(self, model: nn.Module, stream: Stream, options: Options) -> None:
        super().__init__(Workspace(model, checks.working_copy(model), stream, options))
        self.weights = find_weights(self.space.trace, self.space.model)
        self._kept: dict[str, Tensor] = {}

    def rehearse(self) -> None:
        """See :meth:`Workspace.rehearse`."""
        self.space.rehearse(self.space.given)

    def plan_shares(self) -> None:
        """Finds the weights that may be pruned and fixes how many single ones each will lose."""
        space, goal, able = self.space, self.space.options.goal, self.weights.prunable
        whole = self.weights.other | {w.name: "is a single weight" for w in able if w.size == 1}
        whole |= ignored(space.given, able, goal.ignore)
        able = [w for w in able if w.name not in whole]
        whole |= masks.unmaskable(space.model, [w.name for w in able], space.sample, space.options.task.call)
        able = [w for w in able if w.name not in whole]
        whole |= goal.without_share(space.given, able)
        able, self.frozen = [w for w in able if w.name not in whole], whole
        checks.something_to_prune("weights", able, whole)
        if not self.resumes:
            cost, choices = WeightCost(self.weights.total), [range(most(w.size, goal.max_rate) + 1) for w in able]
            with space.timed("ranking"):
                counts = goal.fitted(space.given, able, cost, choices, lambda: self._first_scores(able), whole)
            space.progress.counts = [(w.name, w.size, n) for w, n in zip(able, counts, strict=True) if n]
        self.todo = self.decided({(weight.name, weight.size): weight for weight in able})
        if not self.todo:
            log.warning("nothing is removed: rho=%g is less than half a weight", goal.rho)

    def execute(self) -> SparseResult:
        """Prunes weight after weight."""
        space, tuner, history = self.space, self.space.tuner, self.space.progress.history
        self._begin()
        done, total = len(history), len(self.todo)
        if tuner is not None:
            tuner.begin(*((total, done) if tuner.when == "layer" else (1, 0)), space.progress.tuned)
            # no gradient, momentum or decay moves what is masked
            tuner.optimizer.register_step_post_hook(lambda *_: self._hold())
        with bar(desc="pruning", initial=done, total=total, unit="layer", shown=space.options.progress) as shown:
            for index, (weight, count) in enumerate(self.todo[done:], done):
                record = self._prune_weight(index, weight, count)
                history.append(record)
                self._save()
                less = f"{weight.name} without {count} of {weight.size} weights"
                space.tell(record, shown, f"layer {index + 1} of {total}: {less}")
        self._tune_after()
        space.recalibrate(total + 1)
        return self._result(history)

    def resume(self) -> None:
        """Reads the masks, too."""
        assert self._checkpoint is not None
        masks = self._checkpoint.restore(self.space.model, self._optimizer)
        if masks.keys() != {record.weight for record in self.space.progress.history}:
            raise ValueError("expected a mask in the checkpoint for every weight that was pruned")
        self._kept = {record.weight: masks[record.weight] for record in self.space.progress.history}
        super().resume()

    @property
    def _masks(self) -> Mapping[str, Tensor]:
        return self._kept

    def _prune_weight(self, index: int, weight: Weight, count: int) -> WeightRecord:
        space, tuner = self.space, self.space.tuner
        space.restart(index)
        batch = space.stream.take(space.options.images)
        scoring, tuning = Stopwatch(), Stopwatch()
        loss_start = space.finite_loss(batch, weight.name)
        with scoring:
            scores = self.scores(weight, batch)
            self._kept[weight.name] = without_least(scores, count)
        space.ranks.check_decision(weight.name, {"kept": self._kept[weight.name]})
        self._hold()
        loss_removed = loss_end = space.loss(batch)
        if tuner is not None and tuner.when == "layer":
            with tuning:
                tuner.train_stage()
            space.synchronise()
            loss_end = space.loss(batch)
        return WeightRecord(
            weight=weight.name, size=weight.size, removed=count, loss_start=loss_start, loss_removed=loss_removed,
            loss_end=loss_end, seconds_scoring=scoring.seconds, seconds_tuning=tuning.seconds,
            evaluation=space.evaluation(),
        )  # fmt: skip

    def _hold(self) -> None:
        """Zeroes what is masked."""
        tuner = self.space.tuner
        for name, kept in self._kept.items():
            masks.zero_out(self.space.model.get_parameter(name), kept, None if tuner is None else tuner.optimizer)

    def _first_scores(self, weights: Sequence[Weight]) -> list[Tensor]:
        """Every weight's scores in the unpruned network, on one batch."""
        with bar(weights, desc="ranking", unit="layer", shown=self.space.options.progress) as shown:
            return [self.scores(weight, self.space.probe).flatten().cpu() for weight in shown]

    def scores(self, weight: Weight, batch: Batch) -> Tensor:
        """Of each single weight, in the network as it is now."""
        space, o = self.space, self.space.options
        scorer = WeightScorer(
            space.model, space.trace, weight.name, batch, o.task, space.progress.memory, o.precision, space.ranks
        )  # fmt: skip
        scores = scorer.scores(o.criterion)
        space.progress.memory = scorer.memory
        return scores

    def _result(self, history: list[WeightRecord]) -> SparseResult:
        space, task = self.space, self.space.options.task
        loss_after, evaluation_after = space.loss_after(), space.evaluation()
        with torch.no_grad():
            expected = answer(space.model, space.sample, task.call)
            masks.put_on(space.model, self._kept)
            if not alike(answer(space.model, space.sample, task.call), expected):
                raise RuntimeError("the masked network is not the one with zeros; please report this model")
        space.finish()
        removed = sum(record.removed for record in history)
        parameters = count_parameters(space.given)
        return SparseResult(
            model=space.model, masks=self._kept,
            weights_before=self.weights.total, weights_after=self.weights.total - removed,
            params_before=parameters, params_after=parameters - removed,
            loss_before=space.watch.loss, loss_after=loss_after, history=history, frozen=self.frozen,
            evaluation_before=space.evaluation_before, evaluation_after=evaluation_after,
            settings=space.options.described(checks.device_of(space.model)), seconds=spent(space.seconds, history),
        )  # fmt: skip


def without_least(scores: Tensor, count: int) -> Tensor:
    """A mask, bool of the shape of ``scores``, without the ``count`` smallest; of equal ones the first are dropped."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(stable=True)[:count]] = False
    return kept.view(scores.shape)
