"""What a run records about every group, weight tensor or round."""

from __future__ import annotations

from dataclasses import dataclass, field

from .timing.latency import Latency


@dataclass(frozen=True)
class Curve:
    """What fading one neuron does to its gradient (figure 2 of the paper), measured just before its removal.

    Attributes:
        neuron: counted in the unpruned model.
        t: points of the path, ascending: 1 is the neuron as it is, towards 0 it fades.
        norms: of the loss's gradient at the faded weights, one for each point.
    """

    neuron: int
    t: tuple[float, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class GroupRecord:
    """What happened to one group of coupled neurons.

    Attributes:
        group: its name, that of its first layer.
        size: neurons it had.
        removed: those removed, in order, counted in the unpruned model.
        scores: the score of each when it was removed.
        neurons_scored: scores computed, repetitions included.
        loss_start: loss on the group's own batch before the first removal.
        loss_removed: after the last, before compensation; with ``when="neuron"``, after fine-tuning between neurons.
        loss_end: after compensation and, unless ``when="after"``, fine-tuning.
        seconds_scoring: time spent choosing neurons.
        seconds_compensating: time spent refitting the layers that read them.
        seconds_tuning: time spent fine-tuning.
        uncompensated: the readers that could not be refitted -> why; empty where none was to be.
        first_scores: of all its neurons, before the first removal.
        curves: of the neurons removed last, in a few groups and where the criterion fades neurons.
        evaluation: what ``evaluate`` returned after the group; None without it.
    """

    group: str
    size: int
    removed: tuple[int, ...]
    scores: tuple[float, ...] = field(repr=False)
    neurons_scored: int
    loss_start: float
    loss_removed: float
    loss_end: float
    seconds_scoring: float
    seconds_compensating: float
    seconds_tuning: float
    uncompensated: dict[str, str]
    first_scores: tuple[float, ...] = field(default=(), repr=False)
    curves: tuple[Curve, ...] = field(default=(), repr=False)
    evaluation: float | None = None


@dataclass(frozen=True)
class WeightRecord:
    """What happened to one weight tensor.

    Attributes:
        weight: its qualified name.
        size: how many single weights it holds.
        removed: how many of them were masked.
        loss_start: loss on the layer's own batch before.
        loss_removed: after masking, before fine-tuning.
        loss_end: after fine-tuning, unless that is ``when="after"``.
        seconds_scoring: time spent choosing weights.
        seconds_tuning: time spent fine-tuning.
        evaluation: what ``evaluate`` returned after the tensor; None without it.
    """

    weight: str
    size: int
    removed: int
    loss_start: float
    loss_removed: float
    loss_end: float
    seconds_scoring: float
    seconds_tuning: float
    evaluation: float | None = None


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round of gradual pruning.

    Attributes:
        epoch: after which it took place, counted from 1.
        removed: group -> neurons masked in this round, least relevant first, counted in the unpruned model.
        scores: group -> the score of each, as ranked: divided by the L2 norm of its group's scores.
        channels: how many output channels of layers these neurons own together.
        loss_start: loss on the round's samples in eval mode before these neurons were masked.
        loss_removed: after.
        seconds: how long the round took.
        evaluation_start: what ``evaluate`` returned before these neurons were masked; None without it.
        evaluation_removed: after.
    """

    epoch: int
    removed: dict[str, tuple[int, ...]]
    scores: dict[str, tuple[float, ...]] = field(repr=False)
    channels: int
    loss_start: float
    loss_removed: float
    seconds: float
    evaluation_start: float | None = None
    evaluation_removed: float | None = None


@dataclass(frozen=True)
class LatencyChange:
    """How long a forward pass takes before and after, measured in turns at the end of the run.

    Attributes:
        before: of the unpruned network.
        after: of the pruned one.
        samples: how many went through at once.
    """

    before: Latency
    after: Latency
    samples: int

    @property
    def removed(self) -> float:
        """Share of the median that is gone; below 0 where it has grown."""
        return 1 - self.after.median / self.before.median


Record = GroupRecord | WeightRecord | RoundRecord
