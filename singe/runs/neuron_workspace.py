"""What a run on neurons needs in addition: its progress, and what is compared with the unpruned network."""

from __future__ import annotations

from torch import nn

from .. import checks
from ..criteria import Reconstruction
from ..graph.groups import Group
from ..graph.trace import named_tensors
from ..models.batches import Batch
from ..models.weightnorm import plain_copy, weight_norms, without_weight_norms
from ..ranks import Ranks
from ..refit.equations import Wanted
from ..removal.plan import Plan
from ..scoring.scores import scorer_of
from ..scoring.selection import Scorer
from ..sizes import count_macs
from ..storage.progress import NeuronProgress, Progress
from ..training.data import Stream
from .options import Options
from .workspace import Workspace

COMPARED, MEASURED, SERVED, RANKED = (1 << 20) - 1, (1 << 20) - 2, (1 << 20) - 3, 1 << 19
"""The phases in which samples are drawn to compare networks, to measure their sensitivity and to time them on, and in
which ranking draws: numbered after all others."""


class NeuronWorkspace(Workspace):
    """The model without its weight norms, and whatever else pruning neurons needs.

    Attributes:
        norms: the weight norms that were taken off.
        original: the model as it was given, without them; a copy where its tensors are of inference mode.
        macs: multiply-adds of the unpruned network for one sample; this and the following are set once it has begun.
        compared: samples on which networks are compared, where they are.
        wanted: the values of the unpruned network for these, where pruned ones are compared with it.
        served: samples that networks are timed on, where the target is latency.
    """

    progress: NeuronProgress
    compared: Batch | None = None
    wanted: Wanted | None = None
    served: Batch | None = None

    def __init__(self, given: nn.Module, stream: Stream, options: Options) -> None:
        self.norms = weight_norms(given)
        super().__init__(given, without_weight_norms(checks.working_copy(given)), stream, options)
        made_for_inference = any(t.is_inference() for t in named_tensors(given).values())  # nobody sees them change
        self.original = plain_copy(given) if self.norms or made_for_inference else given

    def begin(self, progress: Progress) -> None:
        """Also draws the samples that networks are compared and timed on."""
        super().begin(progress)
        o = self.options
        self.macs = self.macs_of(self.model)
        if o.compensate != "none" or isinstance(o.criterion, Reconstruction):
            self.compared = self.drawn(o.compensation_images)
            self.wanted = self.wanted_of(self.original, self.progress.plan)
        if o.goal.target == "latency":
            self.served = self._to_serve()

    def remedies(self) -> list[str]:
        """What the user could do about a collapse."""
        refit = ["compensate='least_squares'"] if self.options.compensate == "none" else []
        return super().remedies() + refit

    def drawn(self, images: int) -> Batch:
        """At least ``images`` samples to compare networks on, in batches that the graph takes."""
        self.restart(COMPARED)
        return self.stream.take(self.trace.whole_batches(images))

    def wanted_of(self, network: nn.Module, plan: Plan) -> Wanted:
        """The values of a network that the trace is of, for the samples that networks are compared on.

        Args:
            network: to be kept close to.
            plan: what is removed from it.
        """
        return Wanted(network, self.trace, self.compared, self.options.task, self.options.memory, plan)

    def _to_serve(self) -> Batch:
        self.restart(SERVED)
        batch = self.stream.take(self.options.goal.latency_batch)
        checks.answers(self.model, batch, self.options.task)
        return batch

    def macs_of(self, network: nn.Module) -> int:
        """Multiply-adds of a network for one sample."""
        return count_macs(network, self.sample, self.options.task.call)

    def follow(self, batch: Batch, done: int) -> None:
        """Exports the network again where the graph no longer matches it, which cutting may cause.

        Args:
            batch: to export it on.
            done: number of groups done.
        """
        with self.timed("analysis"):
            if not self.trace.holds_for(self.model, self.sample):
                self.trace, self.progress.traced = self.traced(batch), done

    def scorer(self, group: Group, batch: Batch, wanted: Wanted | None, ranks: Ranks | None = None) -> Scorer:
        """The scorer of a group.

        Args:
            group: as it is now.
            batch: the samples to score it on.
            wanted: what the criterion "reconstruction" compares with.
            ranks: those that share the scoring; all by default.
        """
        o = self.options
        return scorer_of(
            o.criterion, self.model, self.trace, group, batch, o.task, self.progress.memory,
            wanted=wanted, precision=o.precision, ranks=ranks or self.ranks,
        )  # fmt: skip
