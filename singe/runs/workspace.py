"""What a run works on: a copy of the model, its graph, and the samples that it is judged on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import checks
from ..graph.trace import Trace, named_tensors, trace
from ..memory import Memory
from ..models.batches import Batch, head
from ..models.copies import copy_of
from ..models.isolation import same_modes
from ..records import GroupRecord, WeightRecord
from ..removal.surgery import Removed
from ..scoring.admission import check_scorable
from ..scoring.judging import outputs_in_parts
from ..storage.progress import Progress
from ..survey import sample_inputs
from ..timing.stopwatch import Stopwatch, timed
from ..training.collapse import Watch
from ..training.data import Stream
from ..training.finetune import Tuner
from ..training.recalibration import recalibrate, running_norms
from .options import Options

log = logging.getLogger("singe")

TUNED = 1 << 18
"""The first of the phases in which the later parts of fine-tuning draw."""


class Workspace:
    """What both kinds of run need.

    Attributes:
        given: the user's model, which is not changed.
        model: the copy that is pruned, in eval mode.
        still: names of the modules that are in eval mode although the model is in train mode.
        stream: the loader's batches.
        options: of the run.
        ranks: all processes that take part.
        probe: the samples that the run begins with.
        seconds: activity -> the time it took.
        progress: how far the run has come; this and the following are set once it has begun.
        trace: the model as a graph.
        sample: what the model is called with, for a few samples.
        watch: knows the loss before pruning.
        evaluation_before: what the user's ``evaluate`` says of the unpruned network; this and what follows once the
            run is rehearsed.
        seconds_evaluating: that this took.
        tuner: what fine-tunes the model, if it is to be.
    """

    progress: Progress
    trace: Trace
    sample: Any
    watch: Watch
    evaluation_before: float | None = None
    seconds_evaluating: float = 0
    tuner: Tuner | None = None

    def __init__(self, given: nn.Module, model: nn.Module, stream: Stream, options: Options) -> None:
        self.given, self.model, self.stream, self.options, self.ranks = given, model, stream, options, options.ranks
        self.ranks.check_same("arguments", json.dumps(options.deciding(), default=str))
        self.still = [n for n, module in given.named_modules() if given.training and not module.training]
        self.seconds: dict[str, float] = {}
        self._memory = Memory("loss", options.memory, checks.device_of(model))
        self.restart(0)
        self.probe = stream.take(options.images)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        try:
            checks.runs(model, head(self.probe, stream.batch_length), options.task)
        except ValueError:  # it may take just as many as it is to be judged on
            checks.runs(model, self.probe, options.task)
        after = dict(model.named_buffers())
        self._counters = {n: b for n, b in before.items() if n in after and not torch.equal(after[n], b)}

    def begin(self, progress: Progress) -> None:
        """Analyses the network; ``progress`` is where a resumed run stopped.

        Raises:
            ValueError: as :meth:`analyse`.
        """
        self.progress, self.seconds = progress, progress.seconds
        progress.memory = min(progress.memory, self.options.memory)
        self.analyse()

    def analyse(self) -> None:
        """Makes the graph.

        Raises:
            ValueError: the model cannot be traced, shares weights with something outside it, or has no finite loss, or
                one of more than its outputs where that decides what is removed.
        """
        o = self.options
        with self.timed("analysis"):
            self.trace = self.traced(self.probe)
        checks.own_weights(self.given, self.trace)
        judged = o.goal.allocation == "sensitivity"
        check_scorable(self.model, self.trace, self.probe, o.task, o.criterion, judged=judged)
        self.sample = sample_inputs(self.probe, self.trace, o.task)
        with torch.no_grad():
            self.watch = Watch(self._outputs(self.probe), self.probe, o.task)
        if not math.isfinite(self.watch.loss):
            raise ValueError(f"expected a finite loss before pruning, got {self.watch.loss}")

    def traced(self, batch: Batch) -> Trace:
        """The graph of the model as it is now."""
        task = self.options.task
        return trace(self.model, task.inputs(batch), task.call)

    def restart(self, phase: int) -> None:
        """Begins a new epoch with all generators seeded by seed * 2^20 + phase, of which numpy takes 32 bits."""
        self.stream.restart((self.options.seed << 20) + phase)

    def timed(self, what: str) -> AbstractContextManager[None]:
        """Adds to ``seconds``."""
        return timed(self.seconds, what)

    def loss(self, batch: Batch) -> float:
        """The model's loss on a batch."""
        with torch.no_grad():
            return self.options.task.judge(self._outputs(batch), batch).item()

    def _outputs(self, batch: Batch) -> Any:
        return outputs_in_parts(self.model, self.trace, batch, self.options.task, self._memory)

    def finite_loss(self, batch: Batch, part: str) -> float:
        """The same, before a part of the network is pruned; raises ValueError if it is not finite."""
        loss = self.loss(batch)
        if not math.isfinite(loss):
            raise ValueError(f"expected a finite loss before {part} is pruned, got {loss}")
        return loss

    def loss_after(self) -> float:
        """The pruned model's loss on the samples that the run began with; warns where it has collapsed."""
        loss = self.loss(self.probe)
        self.watch.warn(loss, self.remedies())
        return loss

    def remedies(self) -> list[str]:
        """What the user could do about a collapse."""
        o = self.options
        found = [
            "prune less",
            "fine-tune" if o.finetune is None else "fine-tune longer",
            "protect important layers with ignore=",
        ]
        if running_norms(self.model, self.still) and not o.recalibrate_bn:
            found.append("re-estimate batch norms with recalibrate_bn=")
        return found

    def evaluation(self) -> float | None:
        """What the user's ``evaluate`` returns for the model."""
        with self.timed("evaluate"):
            return self.ranks.number(self.options.observer.evaluation(self.model))

    def tell(self, record: GroupRecord | WeightRecord, shown: tqdm, done: str) -> None:
        """Shows and logs what a step has come to, and tells those who watch.

        Args:
            record: of the step.
            shown: the bar of all steps.
            done: what has been removed, in words.
        """
        state = {"loss": f"{record.loss_end:.3f}"}
        if record.evaluation is not None:
            state["evaluation"] = f"{record.evaluation:.4g}"
        shown.set_postfix(state, refresh=False)
        shown.update()
        log.info("%s; %s", done, ", ".join(f"{name} {value}" for name, value in state.items()))
        self.options.observer.tell(record)

    def rehearse(self, unpruned: nn.Module, removed: Callable[[], Removed] = dict) -> None:
        """Does once, before any work, what comes after it, so that what fails is refused in time.

        Args:
            unpruned: the network that fine-tuning may learn from.
            removed: says what of it is gone in the model by now.

        Raises:
            TypeError, ValueError: ``evaluate`` does not return a finite number, the model cannot be trained, or the
                loader does not suit batch norms that are to be recalibrated.
        """
        o, watch = self.options, Stopwatch()
        with watch:
            self.evaluation_before = self.evaluation()
        self.seconds_evaluating = watch.seconds
        if o.finetune is not None:
            self.tuner = Tuner(
                o.finetune, self.model, self.stream, o.task, self.still,
                unpruned=unpruned, removed=removed, progress=o.progress, ranks=self.ranks,
            )  # fmt: skip
            self.tuner.rehearse()
        if o.recalibrate_bn and running_norms(self.model, self.still):
            recalibrate(copy_of(self.model), self.stream, o.task, 1, self.still)

    def tune_after(self, phase: int, save: Callable[[], None]) -> None:
        """Fine-tunes after the last removal: parts that end with an epoch, each with generators seeded for it.

        Args:
            phase: in which the first draws.
            save: called after each, when ``progress`` knows of it.
        """
        assert self.tuner is not None
        progress = self.progress
        while not self.tuner.finished:
            self.restart(TUNED + progress.tuned_parts if progress.tuned_parts else phase)
            with self.timed("fine-tuning"):
                self.tuner.train_stage(by_epoch=True)
            self.synchronise()
            progress.tuned, progress.tuned_parts = self.tuner.step, progress.tuned_parts + 1
            save()

    def recalibrate(self, phase: int) -> None:
        """Re-estimates the statistics of batch norms, if asked to."""
        if not self.options.recalibrate_bn:
            return
        self.restart(phase)
        with self.timed("recalibrating"):
            recalibrate(self.model, self.stream, self.options.task, self.options.recalibrate_bn, self.still)
        self.synchronise()

    def finish(self) -> None:
        """Puts modules into the modes that they had, and what counts passes back to what it was if nothing trained."""
        same_modes(self.model, self.given)
        if self.options.finetune is None and not self.options.recalibrate_bn:
            for name, buffer in self.model.named_buffers():
                if name in self._counters and buffer.shape == self._counters[name].shape:
                    buffer.copy_(self._counters.pop(name))
        if self._counters and self.ranks.first:
            log.warning("%s change in eval mode, too, and have seen all passes of this run", ", ".join(self._counters))

    def synchronise(self) -> None:
        """Makes values the same again that ranks have rounded differently."""
        self.ranks.synchronise(named_tensors(self.model))
