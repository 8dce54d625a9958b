"""The second method: channels are masked at fixed epochs of an ordinary training run (Aketi et al. 2020)."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import checks, values
from .allocation.goal import left_alone
from .criteria import Criterion, resolve
from .graph.trace import Forward, trace
from .identity import of_object
from .memory import Memory, limit
from .models.batches import Batch, parts
from .models.isolation import plain_torch, preserved_random_state, same_modes
from .models.weightnorm import weight_norms
from .models.wrappers import unwrapped
from .observer import Callback, Evaluate, Observer
from .records import RoundRecord
from .removal.plan import Plan
from .removal.surgery import compact, zero
from .removal.trial import check_result
from .removal.zeros import Zeros
from .result import TIMED, PruneResult, compared
from .scoring.admission import check_scorable
from .scoring.judging import outputs_in_parts
from .scoring.rounds import channels, comparable, least
from .scoring.scores import scores_of, unscorable
from .sizes import count_macs, count_parameters, widths
from .storage.rounds import read, state_of
from .survey import sample_inputs, survey
from .task import Loss, Task
from .timing.stopwatch import timed
from .training.data import Stream
from .version import surroundings

log = logging.getLogger("singe")


class GradualPruner:
    """Masks the least relevant channels of a model at fixed epochs of its training; any training loop will do.

    ::

        pruner = singe.GradualPruner(model, x, every=21, per_round=120, until=150)
        for epoch in range(200):
            train_one_epoch(model, loader, optimizer)
            pruner.epoch_end(loader)
        result = pruner.finish()

    Masked channels are zero: their weights, biases, batch norm entries and the weights that read them. After every step
    of a ``torch.optim.Optimizer`` those that it holds are set back to zero, as is its state for them; anything else
    that changes weights, such as averages of earlier ones, must leave zeros alone. The model gets no hooks, parameters
    or buffers.

    Scores are made comparable by dividing those of each group of coupled neurons by their L2 norm, and the neurons of
    all groups are ranked together.

    Attributes:
        epoch: how many have ended.
        frozen: the groups that are left whole, and the modules whose weights could not be followed -> why.
        history: one record per round.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        every: int,
        per_round: int,
        until: int,
        criterion: str | Criterion = "feature_relevance",
        ignore: Collection[str] = (),
        images: int = 1024,
        loss: Loss | None = None,
        forward: Forward | None = None,
        seed: int = 0,
        memory: int | None = None,
        analysis_seconds: float = 600,
        evaluate: Evaluate | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        """Finds out what can be pruned; nothing is masked yet.

        Args:
            model: masked in place from the first round on. If it is wrapped or compiled, the module inside is taken. On
                several processes under DistributedDataParallel, each makes all of these calls, and the first one's
                scores count.
            example: inputs x [B, ...] of ``model(x)``, or whatever ``forward`` takes; a few samples are enough.
            every: number of epochs between rounds; a round takes place at the end of an epoch.
            per_round: the most output channels to mask in a round. A neuron that several layers write together, as in a
                residual stream, counts once for each of its channels in each of them.
            until: the last epoch that may end with a round, counted from 1.
            criterion: what relevance is: a name or an object of ``singe.criteria``.
            ignore: module names or glob patterns; a group with a member among them is left alone.
            images: number of samples to score on, drawn afresh in each round.
            loss: (outputs, batch) -> scalar; mean cross-entropy by default.
            forward: (model, batch) -> outputs, for a model not called as ``model(x)``.
            seed: of everything random in a round; the same seed gives the same masks, in a resumed run too.
            memory: upper bound, in bytes, of the activations of a pass, met where samples can be split; 1 GiB by
                default, on a GPU a sixteenth of its memory if that is more.
            analysis_seconds: how long trial removals on copies may take.
            evaluate: (model) -> a number, the higher the better, such as accuracy on test data. Called on copies in
                eval mode, without gradients, before and after every round's neurons are masked, and on the result;
                recorded in ``history`` and in the result. Decides nothing.
            callbacks: functions of a record, called with each record once its round is over; first with those of a
                loaded state. They decide nothing either, and an exception in one is raised by ``epoch_end``.

        Raises:
            TypeError, ValueError: bad input; see the message. Feature relevance needs a rule for every operator after
                the first layer that may be pruned, and logits [B, classes]; operators without a rule are named.
            TimeoutError: the trials take longer than ``analysis_seconds``.
        """
        for name, value in (("every", every), ("per_round", per_round), ("images", images)):
            values.integer(name, value, 1)
        values.seed(seed)
        if values.integer("until", until, 1) < every:
            raise ValueError(f"expected until >= every, so that there is a round, got until={until} and every={every}")
        values.patterns("ignore", ignore)
        values.positive("analysis_seconds", analysis_seconds)
        self._processes = model.process_group if isinstance(model, DistributedDataParallel) else None
        self._model = unwrapped(model)
        self._device = checks.sound_model(self._model)
        self._kinds = _kinds(self._model)
        if norms := weight_norms(self._model):
            raise ValueError(f"expected a model without weight norms, got one in {norms[0].module}")
        self._every, self._per_round, self._until = every, per_round, until
        self._criterion, self._ignore, self._images, self._seed = resolve(criterion), tuple(ignore), images, seed
        self._memory = Memory("gradual pruning", limit(memory, self._device), self._device)
        self._task = Task(forward, loss)
        first = self._processes is None or torch.distributed.get_rank(self._processes) == 0
        self._observer = Observer(evaluate, callbacks, tells=first)
        with plain_torch(self._device), torch.no_grad(), preserved_random_state():
            self._look(checks.example(example, self._device, self._task), analysis_seconds)
        self.epoch = 0
        self.history: list[RoundRecord] = []
        self._loader: Iterable[Any] | None = None
        self._masked: dict[str, list[int]] = {}  # group -> neurons in the order of masking
        self._zeros: Zeros | None = None  # the same, to be held
        # a compiled step would be compiled again with every round
        hook = register_optimizer_step_post_hook(torch.compiler.disable(partial(_hold, weakref.ref(self))))
        self._release = weakref.finalize(self, hook.remove)

    def _look(self, batch: Batch, seconds: float) -> None:
        """Finds the groups that may lose neurons, and refuses a network that cannot be scored."""
        work = checks.working_copy(self._model)
        checks.runs(work, batch, self._task)
        self._trace = trace(work, self._task.inputs(batch), self._task.call)
        checks.own_weights(self._model, self._trace)
        self._sample = sample_inputs(batch, self._trace, self._task)
        self._timed = sample_inputs(batch, self._trace, self._task, TIMED)
        left_whole = partial(left_alone, self._model, ignore=self._ignore)
        found = survey(work, self._trace, self._sample, self._task, left_whole, seconds)
        blind = unscorable(self._trace, found.able, self._criterion, None)
        self.frozen = found.frozen | blind
        self._groups = {g.name: g for g in found.able if g.name not in blind}
        checks.something_to_prune("neurons", self._groups, self.frozen)
        self._macs = count_macs(work, self._sample, self._task.call)

    def __repr__(self) -> str:
        masked = sum(map(len, self._masked.values()))
        left = max(0, self._until // self._every - self.epoch // self._every)
        return f"GradualPruner(epoch {self.epoch}, {masked} neurons masked, {left} rounds to come)"

    # -- while training --------------------------------------------------------------------------------------

    def epoch_end(self, loader: Iterable[Any]) -> RoundRecord | None:
        """Call this when an epoch has ended; it scores and masks if a round is due.

        The model's modes, gradients and ``requires_grad`` and all random states, the loader's too, are as before.

        Args:
            loader: yields batches (x, y), for feature relevance with class indices y; the training loader will do.

        Returns:
            what the round did, or None where none was due.

        Raises:
            TypeError, ValueError: the model has been moved or cast, the loader's batches cannot be scored, or
                ``evaluate`` returns no finite number. The epoch then does not count, nor does it if ``evaluate``
                itself fails.
        """
        self._check_running()
        stream, epoch = Stream(loader, self._device, self._task), self.epoch + 1
        done = None
        if epoch % self._every == 0 and epoch <= self._until:
            with plain_torch(self._device), preserved_random_state(loader):
                done = self._round(stream, epoch)
            self.history.append(done)
        self.epoch, self._loader = epoch, loader
        if done is not None:
            with preserved_random_state(loader):
                self._observer.tell(done)
        return done

    def _round(self, stream: Stream, epoch: int) -> RoundRecord:
        began, batch, work = time.perf_counter(), self._samples(stream, epoch), checks.working_copy(self._model)
        check_scorable(work, self._trace, batch, self._task, self._criterion)
        groups = list(self._groups.values())
        loss_start, evaluation_start = self._evaluate(work, batch), self._observer.evaluation(work)
        found = scores_of(work, self._trace, groups, batch, self._task, self._criterion, self._memory)
        scores = {g.name: s for g, s in zip(groups, self._agreed(found), strict=True)}
        ranked = {name: comparable(s, self._masked.get(name, ())) for name, s in scores.items()}
        removed = least(self._groups, ranked, self._per_round)
        masked = _with(self._masked, removed)
        zero(work, self._plan(masked).removed())
        loss_removed, evaluation_removed = self._evaluate(work, batch), self._observer.evaluation(work)
        self._mask(masked)
        gone = sum(len(neurons) * channels(self._groups[name]) for name, neurons in removed.items())
        if gone < self._per_round:
            log.info("epoch %d: %d channels are masked, not %d: no others can be", epoch, gone, self._per_round)
        return RoundRecord(
            epoch=epoch,
            removed={name: tuple(neurons) for name, neurons in removed.items()},
            scores={name: tuple(ranked[name][neurons].tolist()) for name, neurons in removed.items()},
            channels=gone,
            loss_start=loss_start,
            loss_removed=loss_removed,
            seconds=time.perf_counter() - began,
            evaluation_start=evaluation_start,
            evaluation_removed=evaluation_removed,
        )

    def _samples(self, stream: Stream, epoch: int) -> Batch:
        stream.restart((self._seed << 20) + epoch)
        return stream.take(self._trace.whole_batches(self._images))

    @torch.no_grad()
    def _evaluate(self, model: nn.Module, batch: Batch) -> float:
        """The loss of a copy in eval mode."""
        # a network that takes one number of samples only gets them as batches of that length
        batches = [batch] if self._trace.dynamic else list(parts(batch, self._trace.example_batch))
        losses = [
            self._task.judge(outputs_in_parts(model, self._trace, own, self._task, self._memory), own)
            for own in batches
        ]
        return float(torch.stack(losses).mean())

    def _agreed(self, scores: list[Tensor]) -> list[Tensor]:
        """The first process's, where there are several."""
        if self._processes is None:
            return scores
        every = torch.cat(scores).to(self._device)
        torch.distributed.broadcast(every, group=self._processes, group_src=0)
        return list(every.cpu().split([len(s) for s in scores]))

    def _mask(self, masked: dict[str, list[int]]) -> None:
        """Masks all of these neurons of the groups."""
        self._masked, removed = masked, self._plan(masked).removed()
        self._zeros = Zeros(self._model, removed)
        zero(self._model, removed)

    def _plan(self, masked: Mapping[str, list[int]]) -> Plan:
        return Plan.of((group, masked[name]) for name, group in self._groups.items() if name in masked)

    # -- the end ---------------------------------------------------------------------------------------------

    def finish(self) -> PruneResult[RoundRecord]:
        """Cuts the masked channels out of a copy of the model; masks are no longer held.

        Returns:
            the smaller copy, checked against the masked model. ``loss_before`` is that before the first round,
            ``loss_after`` that of the result, both on the samples of the first round, drawn again from the last loader;
            NaN where there was none. ``plan.apply(model, optimizer)`` cuts the model itself, to train it further.

        Raises:
            ValueError: it has been called before, or the model has been moved or cast.
        """
        self._check_running()
        plan, task = self._plan(self._masked), self._task
        seconds = {"rounds": sum(record.seconds for record in self.history)}
        if not plan.removals:
            log.warning("nothing is removed: no round has taken place until epoch %d", self.epoch)
        with plain_torch(self._device), torch.no_grad(), preserved_random_state(self._loader):
            zero(self._model, plan.removed())
            work = checks.working_copy(self._model)
            compact(work, plan.removed())
            check_result(self._model, work, plan, self._sample, task.call)
            loss_before, loss_after = self._losses(work)
            macs_after = count_macs(work, self._sample, task.call)
            evaluation_after = self._observer.evaluation(work)
            with timed(seconds, "latency"):
                latency = compared(self._model, work, self._timed, task)
            same_modes(work, self._model)
        self._release()
        return PruneResult(
            model=work, plan=plan,
            params_before=count_parameters(self._model), params_after=count_parameters(work),
            macs_before=self._macs, macs_after=macs_after,
            loss_before=loss_before, loss_after=loss_after, history=self.history, frozen=self.frozen,
            evaluation_before=self.history[0].evaluation_start if self.history else None,
            evaluation_after=evaluation_after, latency=latency, widths=widths(self._model, work),
            settings={name: str(value) for name, value in self._settings().items()} | surroundings(self._device),
            seconds=seconds,
        )  # fmt: skip

    def _losses(self, pruned: nn.Module) -> tuple[float, float]:
        if not self.history:
            return math.nan, math.nan
        if self._loader is None:
            return self.history[0].loss_start, math.nan
        batch = self._samples(Stream(self._loader, self._device, self._task), self.history[0].epoch)
        return self.history[0].loss_start, self._evaluate(pruned, batch)

    def _check_running(self) -> None:
        if not self._release.alive:
            raise ValueError("expected a GradualPruner that is still in use, got one whose finish() was called")
        if (kinds := _kinds(self._model)) != self._kinds:
            raise ValueError(
                f"expected a model of {' and '.join(self._kinds)}, as it was when GradualPruner was made, got one of "
                f"{' and '.join(kinds)}; move or cast a model first"
            )

    # -- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The pruner's progress as tensors, numbers and strings, for the checkpoints of the training loop.

        It does not include the model's and the optimiser's state.
        """
        return state_of(self._settings(), self._sizes(), self.epoch, self.history)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where another pruner of the same model with the same settings was; masks the model at once.

        Load the weights, too, as they were when the state was saved.

        Raises:
            ValueError: not such a state, or one of another model or other settings; or the model has been moved or
                cast. Nothing is changed then.
        """
        self._check_running()
        epoch, history = read(state, self._settings(), self._sizes())
        self.epoch, self.history, masked = epoch, history, dict[str, list[int]]()
        for record in history:
            masked = _with(masked, record.removed)
        self._mask(masked)
        for record in history:
            self._observer.tell(record)

    def _sizes(self) -> dict[str, int]:
        return {name: group.size for name, group in self._groups.items()}

    def _settings(self) -> dict[str, Any]:
        return {
            "every": self._every, "per_round": self._per_round, "until": self._until,
            "criterion": of_object(self._criterion), "ignore": sorted(self._ignore),
            "images": self._images, "seed": self._seed,
        }  # fmt: skip


def _hold(pruner: weakref.ref[GradualPruner], optimizer: Optimizer, args: object, kwargs: object) -> None:
    """Keeps masked weights at zero, whichever optimiser has made a step."""
    held = pruner()
    if held is not None and held._zeros is not None:
        held._zeros.restore(optimizer)


def _kinds(model: nn.Module) -> list[str]:
    """The dtypes of a model's parameters, and where they are."""
    return sorted({f"{p.dtype} on {p.device}" for p in model.parameters()})


def _with(masked: Mapping[str, list[int]], removed: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """What is masked after further removals, group by group in the order of masking."""
    return {name: [*masked.get(name, ()), *removed.get(name, ())] for name in dict.fromkeys([*masked, *removed])}
