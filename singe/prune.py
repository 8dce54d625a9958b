"""Algorithm 1 of the paper: group by group, the least relevant neuron goes, the rest is scored again."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from . import checks
from .batches import Batch
from .collapse import Watch
from .criteria import Criterion, resolve
from .data import Stream
from .engine import DEFAULT_MEMORY, Engine
from .finetune import FineTune, Tuner
from .goal import Allocation, Goal, Target
from .graph.groups import Group
from .graph.trace import Forward, Trace, trace
from .isolation import plain_torch, preserved_random_state, same_modes
from .plan import Plan
from .precision import Precision, check_precision
from .recalibration import recalibrate, running_norms
from .result import GroupRecord, PruneResult, count_macs, count_parameters
from .selection import Refresh, Selection
from .surgery import compact, held_at_zero, mask
from .survey import few, survey
from .task import Loss, Task, cross_entropy
from .trial import check_result
from .weightnorm import plain_copy, weight_norms, with_weight_norms, without_weight_norms
from .wrappers import unwrapped

log = logging.getLogger("singe")


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    rho: float,
    *,
    target: Target = "params",
    criterion: str | Criterion = "integrated_gradient",
    allocation: Allocation = "uniform",
    round_to: int = 1,
    refresh: Refresh = "lazy",
    finetune: FineTune | None = FineTune(),  # noqa: B008 - frozen
    images: int = 64,
    loss: Loss | None = None,
    forward: Forward | None = None,
    ignore: Sequence[str] = (),
    recalibrate_bn: int = 0,
    analysis_seconds: float = 600,
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    precision: Precision = "float32",
    progress: bool = True,
) -> PruneResult:
    """Removes whole neurons until a share ``rho`` of the parameters (or multiply-adds) is gone; fine-tunes in between.

    Args:
        model: any module ``model(x)`` that ``torch.export`` can trace; not modified. Its hooks go with the copies that
            are worked on and are called there. Modules in eval mode inside a model in train mode stay so. Of
            DistributedDataParallel, DataParallel and what torch.compile returns, the module inside is pruned, and all
            names are of that module. Weight norms are taken off for the run and put back around what is left.
        loader: yields batches (x, y), again and again; shuffle it, every group of neurons begins a new epoch.
        rho: share of what ``target`` names to remove, in (0, 1), met to within one neuron.
        target: "params", the model's parameters, tied ones once; or "macs", all multiply-adds of a forward pass,
            as torch counts them.
        criterion: what relevance is: a name or an object of ``singe.criteria``.
        allocation: how rho is shared among groups. "uniform" removes the same share of neurons everywhere, "linear" a
            share that rises from the first group to the last, "block" one that rises from block to block; a mapping
            {module name or glob: relative rate} says it for some groups (1 for the others, 0 leaves whole); "global"
            ranks the neurons of all groups by their first scores per parameter (or multiply-add) that they save.
        round_to: a layer that loses rows keeps a multiple of this many; one that has no more is left whole.
        refresh: after a removal, re-score all of the group ("full", the paper's) or only the least relevant
            candidates until the least is up to date ("lazy").
        finetune: how to train between removals; None for not at all.
        images: samples that scores are computed on, drawn anew for every group.
        loss: (outputs, batch) -> scalar; mean cross-entropy by default.
        forward: (model, batch) -> outputs, for a model that is not ``model(x)``; batches are then any nested tensors.
        ignore: module names or glob patterns; a group with a member among them is left alone.
        recalibrate_bn: images on which batch norms estimate their statistics anew at the end; 0 for not at all.
        analysis_seconds: how long it may take to try on copies what can be removed.
        seed: of everything random in the run; the same seed gives the same plan on the same machine.
        memory: bytes that the activations of one scoring pass may take, so far as images can pass in parts.
        precision: of the passes that compute scores: "float32", the model's own dtype without TF32; "tf32" on CUDA; or
            "bfloat16", autocast.
        progress: whether to show a progress bar on stderr.

    Returns:
        the pruned model with its plan and history.

    Raises:
        TypeError, ValueError: bad input, refused before any work; or a loss that is not finite during the run.
        TimeoutError: the trials take longer than ``analysis_seconds``.
    """
    goal = Goal(rho, target, allocation, round_to, ignore)
    if refresh not in ("lazy", "full"):
        raise ValueError(f"expected refresh 'lazy' or 'full', got {refresh!r}")
    if finetune is not None and not isinstance(finetune, FineTune):
        raise TypeError(f"expected finetune to be a singe.FineTune or None, got {type(finetune).__name__}")
    checks.integer("images", images, 1)
    checks.positive("analysis_seconds", analysis_seconds)
    checks.integer("memory", memory, 1)
    checks.integer("recalibrate_bn", recalibrate_bn, 0)
    checks.integer("seed", seed, 0)
    if seed >= 2**40:
        raise ValueError(f"expected seed < 2**40, got {seed}")
    chosen = resolve(criterion)
    model = unwrapped(model)
    device = checks.sound_model(model)
    check_precision(precision, model, device)
    task = Task(forward, cross_entropy if loss is None else loss)
    stream = Stream(loader, device, task)
    if finetune is not None and not _shuffles(loader):
        log.warning(
            "the loader does not shuffle: every group of neurons begins a new epoch, so fine-tuning will see its first "
            "batches again and again"
        )
    options = _Options(chosen, refresh, finetune, images, task, seed, memory, precision, recalibrate_bn, progress)
    with plain_torch(device), preserved_random_state(loader):
        run = _Run(model, stream, options)
        run.rehearse()
        run.plan_widths(goal, analysis_seconds)
        return run.execute()


@dataclass(frozen=True)
class _Options:
    """The arguments of :func:`prune` that hold for the whole run."""

    criterion: Criterion
    refresh: Refresh
    finetune: FineTune | None
    images: int
    task: Task
    seed: int
    memory: int
    precision: Precision
    recalibrate_bn: int
    progress: bool


class _Run:
    """One call of :func:`prune`: the working copy, what has been decided, and what has been done."""

    def __init__(self, model: nn.Module, stream: Stream, options: _Options) -> None:
        self._given, self._stream, self._options = model, stream, options
        self._norms = weight_norms(model)
        self._work = without_weight_norms(checks.copied(model))
        self._original = plain_copy(model) if self._norms else model
        self._still = [n for n, module in model.named_modules() if model.training and not module.training]
        self._plan = Plan()
        self._todo: list[tuple[Group, int]] = []
        self._frozen: dict[str, str] = {}  # names of groups left whole -> why
        self._restart(0)
        self._probe = stream.take(options.images)
        checks.runs(self._work, self._probe, options.task)
        self._trace = self._traced(self._probe)
        checks.own_weights(model, self._trace)
        self._sample = few(self._probe, self._trace, options.task)
        self._watch = Watch(self._work, self._probe, options.task)
        if not math.isfinite(self._watch.loss):
            raise ValueError(f"expected a finite loss before pruning, got {self._watch.loss}")
        self._macs_before = count_macs(self._work, self._sample, self._options.task.call)

    # -- before the first removal ----------------------------------------------------------------------------

    def plan_widths(self, goal: Goal, seconds: float) -> None:
        """Finds the groups that may be pruned and fixes how many neurons each will lose."""
        task, left_whole = self._options.task, partial(goal.left_whole, self._original)
        found = survey(self._work, self._trace, self._sample, task, left_whole, seconds)
        able, self._frozen = found.able, found.frozen
        for name, reason in self._frozen.items():
            log.info("%s is not pruned: %s", name, reason)
        if not able:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._frozen.items())
            raise ValueError(f"expected a model with neurons to prune, found none ({reasons or 'no layers'})")
        counts = goal.counts(self._original, able, self._trace, self._macs_before, lambda: self._first_scores(able))
        self._todo = [(g, n) for g, n in zip(able, counts, strict=True) if n]
        if not self._todo:
            log.warning("nothing is removed: rho=%g is less than half of the smallest step", goal.rho)

    def _first_scores(self, groups: Sequence[Group]) -> list[Tensor]:
        """Every neuron's score in the unpruned network, on one batch."""
        with tqdm(groups, "first scores", unit="group", disable=not self._options.progress) as bar:
            return [self._engine(g, self._probe).scores(self._options.criterion) for g in bar]

    # -- the run ---------------------------------------------------------------------------------------------

    def execute(self) -> PruneResult:
        """Prunes group after group."""
        neurons = sum(n for _, n in self._todo)
        tuner = self._tuner(neurons)
        history = []
        with tqdm(total=neurons, unit="neuron", disable=not self._options.progress) as bar:
            for index, (group, count) in enumerate(self._todo):
                bar.set_description(group.name)
                history.append(self._prune_group(index, group, count, tuner, bar))
                bar.set_postfix(loss=f"{history[-1].loss_end:.3f}")
        if tuner is not None and tuner.when == "after":
            self._restart(len(self._todo))
            tuner.pause()
        if self._options.recalibrate_bn:
            self._restart(len(self._todo) + 1)
            recalibrate(self._work, self._stream, self._options.task, self._options.recalibrate_bn, self._still)
        return self._result(history)

    def rehearse(self) -> None:
        """Refuses a loader that batch norms cannot be recalibrated on before any work."""
        if self._options.recalibrate_bn and running_norms(self._work, self._still):
            recalibrate(copy.deepcopy(self._work), self._stream, self._options.task, 1, self._still)

    def _tuner(self, neurons: int) -> Tuner | None:
        if self._options.finetune is None:
            return None
        pauses = {"layer": len(self._todo), "neuron": neurons, "after": 1}[self._options.finetune.when]
        tuner = Tuner(self._options.finetune, self._work, self._stream, self._options.task, pauses, self._still)
        tuner.rehearse()
        return tuner

    def _prune_group(self, index: int, group: Group, count: int, tuner: Tuner | None, bar: tqdm) -> GroupRecord:
        self._restart(index)
        batch = self._stream.take(self._options.images)
        current = self._plan.rebase(group)
        if not self._trace.holds_for(self._work, self._sample):
            self._trace = self._traced(batch)
        optimizer = tuner.optimizer if tuner is not None else None
        scoring, tuning = _Stopwatch(), _Stopwatch()
        with scoring:
            selection = Selection(self._engine(current, batch), self._options.criterion, self._options.refresh)
        loss_start = selection.engine.loss
        for _ in range(count):
            with scoring:
                neuron = selection.take_least()
            mask(self._work, current.slices, torch.tensor([neuron]), optimizer)
            if tuner is not None and tuner.when == "neuron":
                with (
                    tuning,
                    held_at_zero(self._work, current.slices, torch.tensor(selection.taken), tuner.optimizer),
                ):
                    tuner.pause()
                with scoring:
                    selection.renew(self._engine(current, batch))
            else:
                selection.engine.forget(neuron)
            bar.update()
        loss_removed = self._evaluate(batch)
        here = Plan()
        here.add(current, selection.taken)
        compact(self._work, here.removed(), optimizer)
        self._plan.add(group, selection.taken)
        loss_end = loss_removed
        if tuner is not None and tuner.when == "layer":
            with tuning:
                tuner.pause()
            loss_end = self._evaluate(batch)
        return GroupRecord(
            group=group.name, size=group.size, removed=tuple(selection.taken), scores=tuple(selection.taken_scores),
            neurons_scored=selection.scored, loss_start=loss_start, loss_removed=loss_removed,
            loss_end=loss_end, seconds_scoring=scoring.seconds, seconds_tuning=tuning.seconds,
        )  # fmt: skip

    def _result(self, history: list[GroupRecord]) -> PruneResult:
        with_weight_norms(self._work, self._norms)
        check_result(self._original, self._work, self._plan, self._sample, self._options.task.call)
        loss_after = self._watch.loss_after(self._work)
        macs_after = count_macs(self._work, self._sample, self._options.task.call)
        same_modes(self._work, self._given)
        return PruneResult(
            model=self._work, plan=self._plan,
            params_before=count_parameters(self._given), params_after=count_parameters(self._work),
            macs_before=self._macs_before, macs_after=macs_after,
            loss_before=self._watch.loss, loss_after=loss_after, history=history, frozen=self._frozen,
        )  # fmt: skip

    def _evaluate(self, batch: Batch) -> float:
        with torch.no_grad():
            return self._options.task(self._work, batch).item()

    def _restart(self, phase: int) -> None:
        """Begins a new epoch; no two phases of any two seeds below 4096 see the same."""
        self._stream.restart((self._options.seed << 20) + phase)

    def _engine(self, group: Group, batch: Batch) -> Engine:
        o = self._options
        return Engine(self._work, self._trace, group, batch, o.task, o.memory, o.precision)

    def _traced(self, batch: Batch) -> Trace:
        task = self._options.task
        return trace(self._work, task.inputs(batch), task.call)


def _shuffles(loader: Iterable[Any]) -> bool:
    """False only for loaders that are known to give the same batches in every epoch."""
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None) if batches is not None else getattr(loader, "sampler", None)
    return not isinstance(loader, (list, tuple)) and not isinstance(sampler, SequentialSampler)


class _Stopwatch:
    """Seconds spent inside its ``with`` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
