"""Algorithm 1 of the paper: group by group, the least relevant neuron goes, the rest is scored again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm import tqdm

from . import checks
from .allocation import ALLOCATIONS, ParameterCount
from .batches import Batch, head
from .criteria import Criterion, resolve
from .data import Stream
from .engine import DEFAULT_MEMORY, Engine
from .finetune import FineTune, Tuner
from .graph.analysis import find_groups
from .graph.groups import Group
from .graph.trace import Forward, Trace, trace
from .isolation import plain_torch, preserved_random_state
from .plan import Plan
from .result import GroupRecord, PruneResult, count_macs, count_parameters
from .selection import Refresh, Selection
from .surgery import compact, held_at_zero, mask
from .task import Loss, Task, cross_entropy
from .trial import check_result, unsafe_groups

log = logging.getLogger("singe")


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    rho: float,
    *,
    criterion: str | Criterion = "integrated_gradient",
    allocation: str = "uniform",
    refresh: Refresh = "lazy",
    finetune: FineTune | None = FineTune(),  # noqa: B008 - frozen
    images: int = 64,
    loss: Loss | None = None,
    forward: Forward | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    memory: int = DEFAULT_MEMORY,
    progress: bool = True,
) -> PruneResult:
    """Removes whole neurons until a share ``rho`` of the parameters is gone, and fine-tunes in between.

    Args:
        model: any module ``model(x)`` that ``torch.export`` can trace; not modified. Its hooks go with the copies that
            are worked on. Modules in eval mode inside a model in train mode stay so while fine-tuning.
        loader: yields batches (x, y), again and again; shuffle it, every group of neurons begins a new epoch.
        rho: share of the model's parameters to remove, in (0, 1), met to within one neuron; tied ones count once.
        criterion: what relevance is: a name or an object of ``singe.criteria``.
        allocation: how rho is shared among groups: "uniform" removes the same share of neurons everywhere.
        refresh: after a removal, re-score all of the group ("full", the paper's) or only the least relevant
            candidates until the least is up to date ("lazy").
        finetune: how to train between removals; None for not at all.
        images: samples that scores are computed on, drawn anew for every group.
        loss: (outputs, batch) -> scalar; mean cross-entropy by default.
        forward: (model, batch) -> outputs, for a model that is not ``model(x)``; batches are then any nested tensors.
        ignore: module names or glob patterns; a group with a member among them is left alone.
        seed: of everything random in the run; the same seed gives the same plan on the same machine.
        memory: bytes that the activations of one scoring pass may take.
        progress: whether to show a progress bar on stderr.

    Returns:
        the pruned model with its plan and history.

    Raises:
        TypeError, ValueError: bad input, refused before any work; or a loss that is not finite during the run.
    """
    rho = checks.number("rho", rho)
    if not 0 < rho < 1:
        raise ValueError(f"expected rho in (0, 1), got {rho}")
    if not isinstance(allocation, str) or allocation not in ALLOCATIONS:
        raise ValueError(f"expected allocation among {', '.join(ALLOCATIONS)}, got {allocation!r}")
    if refresh not in ("lazy", "full"):
        raise ValueError(f"expected refresh 'lazy' or 'full', got {refresh!r}")
    if finetune is not None and not isinstance(finetune, FineTune):
        raise TypeError(f"expected finetune to be a singe.FineTune or None, got {type(finetune).__name__}")
    checks.integer("images", images, 1)
    checks.integer("memory", memory, 1)
    checks.integer("seed", seed, 0)
    if seed >= 2**62:
        raise ValueError(f"expected seed < 2**62, got {seed}")
    chosen = resolve(criterion)
    device = checks.device_of(model)
    checks.finite_weights(model)
    task = Task(forward, cross_entropy if loss is None else loss)
    stream = Stream(loader, device, task)
    if finetune is not None and not _shuffles(loader):
        log.warning(
            "the loader does not shuffle: every group of neurons begins a new epoch, so fine-tuning will see its first "
            "batches again and again"
        )
    options = _Options(chosen, refresh, finetune, images, task, seed, memory)
    with plain_torch(device), preserved_random_state(loader):
        run = _Run(model, stream, options)
        run.plan_widths(rho, allocation, ignore)
        return run.execute(progress)


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


class _Run:
    """One call of :func:`prune`: the working copy, what has been decided, and what has been done."""

    def __init__(self, model: nn.Module, stream: Stream, options: _Options) -> None:
        self._original, self._stream, self._options = model, stream, options
        self._work = checks.copied(model)
        self._plan = Plan()
        self._todo: list[tuple[Group, int]] = []
        self._frozen: dict[str, str] = {}
        stream.restart(options.seed)
        self._probe = stream.take(options.images)
        checks.runs(self._work, self._probe, options.task)
        self._trace = self._traced(self._probe)
        # a few samples where the model takes any number
        few = head(self._probe, 4) if self._trace.dynamic else self._probe
        self._sample = options.task.inputs(few)
        self._loss_before = self._evaluate(self._probe)
        if not math.isfinite(self._loss_before):
            raise ValueError(f"expected a finite loss before pruning, got {self._loss_before}")
        self._constant_loss = self._constant_answer_loss()
        self._macs_before = count_macs(self._work, self._sample, self._options.task.call)

    # -- before the first removal ----------------------------------------------------------------------------

    def plan_widths(self, rho: float, allocation: str, ignore: Sequence[str]) -> None:
        """Finds the groups that may be pruned and fixes how many neurons each will lose."""
        groups = find_groups(self._trace)
        ignored = ignored_groups(self._original, groups, ignore)
        self._frozen = {g.name: g.frozen for g in groups if g.frozen is not None}
        self._frozen |= {g.name: "has only one neuron" for g in groups if g.size == 1 and g.frozen is None}
        self._frozen |= {name: "ignored" for name in ignored}
        able = [g for g in groups if g.name not in self._frozen]
        self._frozen |= unsafe_groups(self._work, able, self._sample, self._options.task.call)
        able = [g for g in able if g.name not in self._frozen]
        for name, reason in self._frozen.items():
            log.info("%s is not pruned: %s", name, reason)
        if not able:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._frozen.items())
            raise ValueError(f"expected a model with neurons to prune, found none ({reasons or 'no layers'})")
        sizes = [g.size for g in able]
        counts = ALLOCATIONS[allocation](ParameterCount(self._original, able), sizes, rho)
        self._todo = [(g, n) for g, n in zip(able, counts, strict=True) if n]

    # -- the run ---------------------------------------------------------------------------------------------

    def execute(self, progress: bool) -> PruneResult:
        """Prunes group after group."""
        neurons = sum(n for _, n in self._todo)
        tuner = self._tuner(neurons)
        history = []
        with tqdm(total=neurons, unit="neuron", disable=not progress) as bar:
            for index, (group, count) in enumerate(self._todo):
                bar.set_description(group.name)
                history.append(self._prune_group(index, group, count, tuner, bar))
                bar.set_postfix(loss=f"{history[-1].loss_end:.3f}")
        if tuner is not None and tuner.when == "after":
            self._stream.restart(self._options.seed + len(self._todo))
            tuner.pause()
        return self._result(history)

    def _tuner(self, neurons: int) -> Tuner | None:
        if self._options.finetune is None:
            return None
        pauses = {"layer": len(self._todo), "neuron": neurons, "after": 1}[self._options.finetune.when]
        original = self._original
        still = [n for n, module in original.named_modules() if original.training and not module.training]
        tuner = Tuner(self._options.finetune, self._work, self._stream, self._options.task, pauses, still)
        tuner.rehearse()
        return tuner

    def _prune_group(self, index: int, group: Group, count: int, tuner: Tuner | None, bar: tqdm) -> GroupRecord:
        self._stream.restart(self._options.seed + index)
        batch = self._stream.take(self._options.images)
        current = self._plan.rebase(group)
        if not self._trace.holds_for(self._work, self._options.task.inputs(batch)):
            self._trace = self._traced(batch)
        optimizer = tuner.optimizer if tuner is not None else None
        scoring, tuning = _Stopwatch(), _Stopwatch()

        def engine() -> Engine:
            return Engine(self._work, self._trace, current, batch, self._options.task, self._options.memory)

        with scoring:
            selection = Selection(engine(), self._options.criterion, self._options.refresh)
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
                    selection.renew(engine())
            else:
                selection.engine.forget(neuron)
            bar.update()
        loss_removed = self._evaluate(batch)
        here = Plan()
        here.add(current, selection.taken)
        compact(self._work, here.removed(), optimizer)
        self._plan.add(group, selection.taken)
        if tuner is not None and tuner.when == "layer":
            with tuning:
                tuner.pause()
        return GroupRecord(
            group=group.name, size=group.size, removed=tuple(selection.taken), scores=tuple(selection.taken_scores),
            neurons_scored=selection.scored, loss_start=loss_start, loss_removed=loss_removed,
            loss_end=self._evaluate(batch), seconds_scoring=scoring.seconds, seconds_tuning=tuning.seconds,
        )  # fmt: skip

    def _result(self, history: list[GroupRecord]) -> PruneResult:
        check_result(self._original, self._work, self._plan, self._sample, self._options.task.call)
        loss_after = self._evaluate(self._probe)
        self._warn_if_collapsed(loss_after)
        macs_after = count_macs(self._work, self._sample, self._options.task.call)
        for name, module in self._original.named_modules():
            self._work.get_submodule(name).training = module.training
        return PruneResult(
            model=self._work, plan=self._plan,
            params_before=count_parameters(self._original), params_after=count_parameters(self._work),
            macs_before=self._macs_before, macs_after=macs_after,
            loss_before=self._loss_before, loss_after=loss_after, history=history, frozen=self._frozen,
        )  # fmt: skip

    def _evaluate(self, batch: Batch) -> float:
        with torch.no_grad():
            return self._options.task(self._work, batch).item()

    def _traced(self, batch: Batch) -> Trace:
        task = self._options.task
        return trace(self._work, task.inputs(batch), task.call)

    def _warn_if_collapsed(self, loss_after: float) -> None:
        """Warns where more than half of what the network knew beyond a constant answer is gone."""
        knew = self._constant_loss - self._loss_before
        knew_something = knew > 0.05 * abs(self._constant_loss)
        if math.isfinite(loss_after) and not (knew_something and loss_after > self._loss_before + knew / 2):
            return
        log.warning(
            "the pruned network may have collapsed: its loss on %d samples is %.3f, it was %.3f before pruning, and "
            "a constant answer has %.3f; prune less, fine-tune longer, or ignore= what matters",
            self._options.images, loss_after, self._loss_before, self._constant_loss,
        )  # fmt: skip

    def _constant_answer_loss(self) -> float:
        """The loss of giving every sample one answer, the mean output or less of it; NaN where outputs have no mean."""
        with torch.no_grad():
            outputs = self._options.task.outputs(self._work, self._probe)
            if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
                return math.nan
            mean = outputs.mean(0, keepdim=True).expand_as(outputs)
            return min(self._options.task.judge(mean * part, self._probe).item() for part in (0, 0.25, 0.5, 1))


def ignored_groups(model: nn.Module, groups: Iterable[Group], patterns: Sequence[str]) -> set[str]:
    """Names of the groups with a member that some pattern names.

    Args:
        model: whose modules the patterns name.
        groups: of that model.
        patterns: names of modules, or globs over them; a module stands for all inside it too.

    Raises:
        TypeError: ``patterns`` is a single string.
        ValueError: a pattern that names no module.
    """
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"expected a list of module names for ignore, got {patterns!r}")
    modules = [name for name, _ in model.named_modules() if name]
    named: set[str] = set()
    for pattern in patterns:
        found = {m for m in modules if fnmatchcase(m, pattern)}
        if not found:
            raise ValueError(f"expected module names or patterns that match one in ignore, got {pattern!r}")
        named |= {m for m in modules if any(m == f or m.startswith(f"{f}.") for f in found)}
    return {g.name for g in groups if named.intersection(g.members)}


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
