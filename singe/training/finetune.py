"""The built-in training loop, which runs after pruning or between removals."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import values
from ..bars import bar
from ..memory import raise_shortage
from ..models.batches import Batch, described, head, length
from ..models.copies import copy_of
from ..models.precision import Precision, arithmetic, callers_multiplication
from ..ranks import ALONE, Ranks
from ..removal.surgery import Removed
from ..task import Task, differentiable
from .data import Stream
from .distillation import Teacher

log = logging.getLogger("singe")

When = Literal["after", "layer", "neuron"]

LEARNING_RATES = {"sgd": 0.02, "adamw": 2e-4}
"""By default."""

SHORTEST = 100
"""Steps that a part of a stage has at least, where stages are trained in parts."""

DISTILLED = 0.5
"""The default share of the loss that is the divergence from the unpruned network's answers."""


@dataclass(frozen=True)
class FineTune:
    """How to fine-tune: at a constant learning rate, which falls linearly to zero over the last steps.

    Args:
        steps: optimiser steps in the whole run, spread evenly over its stages.
        when: the stages: all "after" pruning, after every "layer" (group of neurons), or after every "neuron".
        lr: learning rate before it falls; None for .02 with "sgd" and 2e-4 with "adamw", where at most .01 is allowed.
        momentum: of SGD, or the first of Adam's betas, in [0, 1).
        weight_decay: on weights of two and more axes; biases and batch norms are not decayed.
        cooldown: share of the steps, the last ones, over which the learning rate falls to zero, in [0, 1].
        distill: share of the loss, in [0, 1], that is the divergence from the unpruned network's answers (see
            ``singe.training.distillation``), for networks that return logits [B, classes, ...]; None for a half with
            the default loss and for nothing with one of the user's own.
        hints: weight, beside the loss, of how far what layers read is from what they read in the unpruned network (see
            ``singe.training.hints``). 50 helps most with a few hundred steps where batch norms keep them small.
        optimizer: "sgd", with Nesterov momentum; or "adamw", for networks that SGD trains badly, such as transformers.
        precision: of the training steps: "bfloat16", autocast; "float32" without or "tf32" with TF32 on CUDA; None for
            the model's own dtype with torch's current settings.
    """

    steps: int = 1000
    when: When = "after"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    cooldown: float = 0.3
    distill: float | None = None
    hints: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    precision: Precision | None = None

    def __post_init__(self) -> None:
        values.integer("steps", self.steps, 1)
        values.choice("optimizer", self.optimizer, tuple(LEARNING_RATES))
        values.choice("when", self.when, get_args(When))
        for name in ("momentum", "weight_decay", "cooldown"):
            values.number(name, getattr(self, name))
        values.number("lr", self.learning_rate)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"expected lr > 0, got {self.lr!r}")
        if self.optimizer == "adamw" and self.learning_rate > 0.01:  # a step moves every weight by about that much
            raise ValueError(f"expected lr <= 0.01 with optimizer='adamw', typically 1e-5 to 1e-3, got {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected momentum in [0, 1), got {self.momentum!r}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"expected cooldown in [0, 1], got {self.cooldown!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"expected weight_decay >= 0, got {self.weight_decay!r}")
        if self.distill is not None and not 0 <= values.number("distill", self.distill) <= 1:
            raise ValueError(f"expected distill in [0, 1] or None, got {self.distill!r}")
        if not 0 <= values.number("hints", self.hints) < math.inf:
            raise ValueError(f"expected hints >= 0, got {self.hints!r}")
        if self.precision is not None:
            values.choice("precision", self.precision, get_args(Precision))

    @property
    def learning_rate(self) -> float:
        """Before it falls: ``lr``, or what is usual with the optimiser."""
        return LEARNING_RATES[self.optimizer] if self.lr is None else self.lr

    def distilled(self, task: Task) -> float:
        """The share of the loss that comes from the unpruned network."""
        if self.distill is None:
            return DISTILLED if task.loss is None else 0.0
        return self.distill


class Tuner:
    """One optimiser and one schedule over a whole run, which trains a few steps in each of its stages.

    Args:
        how: steps and learning rate.
        model: trained in place.
        stream: of batches.
        task: how the model is called and judged.
        still: names of modules that stay in eval mode.
        unpruned: the network to learn from; not modified.
        removed: returns what has been removed from it in the model so far.
        progress: whether stages show a bar.
        ranks: that train together, each on its share of the stream; gradients are averaged over them.

    Attributes:
        optimizer: of the parameters that require a gradient; surgery keeps its state aligned.
        when: see :class:`FineTune`.
        step: how many steps of the whole run are done.
        reentrant: whether the network has checkpoints that take no choice of parameters; the rehearsal finds out.
    """

    def __init__(
        self,
        how: FineTune,
        model: nn.Module,
        stream: Stream,
        task: Task,
        still: Sequence[str] = (),
        *,
        unpruned: nn.Module,
        removed: Callable[[], Removed] = dict,
        progress: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.when, self._ranks = how.when, ranks
        self._how, self._model, self._stream, self._task = how, model, stream, task
        self._stages, self._stage, self.step = 1, 0, 0
        self._still, self._progress = still, progress
        self._unused = True  # whether the loss may not depend on some parameter; the rehearsal finds out
        self.reentrant = False
        self._removed = removed
        self._outputs: Callable[[Batch], Any] | None = None  # while it trains
        share = how.distilled(task)
        self._teacher = Teacher(unpruned, task, share, how.hints, ranks) if share or how.hints else None
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ValueError("expected a parameter that requires a gradient to fine-tune, got none; pass finetune=None")
        self.optimizer = _optimizer(how, trained)

    def begin(self, stages: int, done: int = 0, steps: int = 0) -> None:
        """Says how many stages the whole run has, one by default, how many are done, and steps of the next."""
        self._stages, self._stage = stages, done
        self.step = self._steps_of(done) + steps

    def _steps_of(self, stages: int) -> int:
        """How many steps the first stages take."""
        return round(self._how.steps * stages / self._stages) if self._stages else 0

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.step >= self._how.steps

    def train_stage(self, *, by_epoch: bool = False) -> int:
        """Trains for this stage's share of the steps, in train mode; leaves the model in eval mode.

        Args:
            by_epoch: whether to stop before that where an epoch of the stream ends, so that the stage takes more calls.

        Returns:
            the number of steps taken.

        Raises:
            ValueError: the loss is not finite.
        """
        first, before, target = self.step, self._steps_of(self._stage), self._steps_of(self._stage + 1)
        if first == target:
            self._stage += 1
            return 0
        self._train_mode(self._model)
        if self._teacher is not None and self._how.hints:
            self._teacher.keep(self._removed())
        try:
            self._outputs = self._distributed()
            with bar(
                desc="fine-tuning", initial=first - before, total=target - before, unit="step", shown=self._progress,
                inside=True,
            ) as shown:  # fmt: skip
                while self.step < target:
                    if by_epoch and self.step - first >= SHORTEST and self._stream.epoch_over():
                        break
                    loss = self._train_step()
                    self.step += 1
                    shown.set_postfix(loss=f"{loss:.3f}", refresh=False)
                    shown.update()
                    if self._progress and self.step % max(1, self._how.steps // 10) == 0:
                        log.info("fine-tuning: %d of %d steps, loss %.4f", self.step, self._how.steps, loss)
        finally:
            self._outputs = None  # so that an exception that is kept does not keep other ranks waiting
            self._model.eval()
            self.optimizer.zero_grad(set_to_none=True)
        self._ranks.synchronise(dict(self._model.named_buffers()))  # statistics of batch norms are of a rank's share
        self._stage += self.step == target
        return self.step - first

    def rehearse(self) -> None:
        """One step of training on a copy, before anything is pruned, so that failures come early.

        Raises:
            TypeError, ValueError: the network or the loss cannot be trained on the loader's batches.
        """
        batch, _ = self._stream.next_share()
        self._rehearse_on(batch)
        lone = self._stream.before_lone
        if lone is not None and lone < self._how.steps and self._ranks.size == 1:
            self._rehearse_on(head(batch, 1))

    def _rehearse_on(self, batch: Batch) -> None:
        model = copy_of(self._model)
        self._train_mode(model)
        try:
            self._step_once(model, batch)
            copy_of(model)  # with what it keeps of its last pass, as after fine-tuning
        except (RuntimeError, ValueError, TypeError) as error:
            raise_shortage(error)
            if "use_reentrant" in str(error) and not self.reentrant:
                self.reentrant = True
                self._rehearse_on(batch)
                return
            remark = "; try drop_last=True" if length(batch) == 1 else ""
            raise (TypeError if isinstance(error, TypeError) else ValueError)(
                f"expected a network and a loss that can be trained, in train mode, on batches of {described(batch)}"
                f"{remark}: {error}"
            ) from error

    def _step_once(self, model: nn.Module, batch: Batch) -> None:
        """One optimiser step of a copy; finds out whether the loss may not depend on some parameter."""
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = _optimizer(self._how, list(trained.values()))
        with torch.enable_grad(), self._arithmetic():
            loss = differentiable(self._loss(model, partial(self._task.outputs, model), batch))
            self._backward(loss, list(trained.values()))
        self._unused = any(p.grad is None for p in trained.values())
        if sparse := [name for name, p in trained.items() if p.grad is not None and p.grad.is_sparse]:
            raise ValueError(f"expected dense gradients, got a sparse one of {sparse[0]}; make it with sparse=False")
        optimizer.step()

    def _train_mode(self, model: nn.Module) -> None:
        model.train()
        for name in self._still:
            model.get_submodule(name).training = False

    def _distributed(self) -> Callable[[Batch], Any]:
        """A function from a batch to outputs, with gradients that are averaged over the ranks if there are several.

        Rebuilt for every stage, since pruning has changed parameters.
        """
        if self._ranks.size == 1:
            return partial(self._task.outputs, self._model)
        on_cpu = next(self._model.parameters()).device.type == "cpu"
        unused = bool(self._ranks.sum(torch.tensor(float(self._unused))))  # of any rank: all have to say the same
        return DistributedDataParallel(
            _Answering(self._model, self._task),
            process_group=self._ranks.group if on_cpu else None,  # gloo's own, or what is right for the device
            find_unused_parameters=unused and not self.reentrant,  # a static graph finds them as it goes
            static_graph=self.reentrant,
        )

    def _train_step(self) -> float:
        """One step; returns the loss."""
        assert self._outputs is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        batch, weight = self._stream.next_share()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.enable_grad(), self._arithmetic(), self._ranks.together():
                loss = self._loss(self._model, self._outputs, batch)
                loss = loss if weight == 1 else weight * loss
                fetched = _fetched(loss.detach())
                self._backward(loss, trained)
        except ValueError as error:
            if length(batch) > 1:
                raise
            raise ValueError(f"fine-tuning failed on a batch of one sample; try drop_last=True: {error}") from error
        value = float(self._ranks.sum(fetched())) / self._ranks.size
        if not math.isfinite(value):
            raise ValueError(
                f"expected a finite loss, got {value} at fine-tuning step {self.step + 1} of "
                f"{self._how.steps}; try a smaller lr than {self._how.learning_rate}"
            )
        self.optimizer.step()
        return value

    def _backward(self, loss: Tensor, trained: Sequence[Tensor]) -> None:
        """Leaves gradients at what is trained, and at parameters of the user's loss only if it can't be helped."""
        loss.backward(inputs=None if self.reentrant else trained)

    def _loss(self, model: nn.Module, outputs_of: Callable[[Batch], Any], batch: Batch) -> Tensor:
        if self._teacher is None:
            return self._task.lesson(outputs_of(batch), batch)
        with self._teacher.reading(model) as reads:
            outputs = outputs_of(batch)
        return self._teacher.loss(self._task.lesson(outputs, batch), outputs, reads, batch)

    def _arithmetic(self) -> AbstractContextManager[None]:
        if self._how.precision is None:
            return callers_multiplication()
        return arithmetic(self._how.precision, next(self._model.parameters()).device)

    def _learning_rate(self) -> float:
        falling = self._how.cooldown * self._how.steps
        left = self._how.steps - self.step
        return self._how.learning_rate * (min(1.0, left / falling) if falling else 1.0)


def _optimizer(how: FineTune, trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": how.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if how.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=how.learning_rate, betas=(how.momentum, 0.999))
    return torch.optim.SGD(groups, lr=how.learning_rate, momentum=how.momentum, nesterov=how.momentum > 0)


def _fetched(value: Tensor) -> Callable[[], Tensor]:
    """A function that returns a value on the CPU, and does not wait for what a GPU is given to do in the meantime.

    So a GPU is still busy with the backward pass when the next operators reach it.
    """
    if value.device.type != "cuda":
        return value.cpu
    there = value.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(value.device).record_event()

    def fetch() -> Tensor:
        arrived.synchronize()
        return there

    return fetch


class _Answering(nn.Module):
    """A model as the user calls it, so that one wrapper serves every way of calling it."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, batch: Batch) -> Any:
        """The model's answer to a batch."""
        return self._task.outputs(self.model, batch)
