"""Which way of scoring neurons a criterion needs, and whether that is possible."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..criteria import Criterion, FeatureRelevance, Reconstruction
from ..graph.groups import Group
from ..graph.trace import Trace
from ..memory import Memory
from ..models.batches import Batch
from ..models.precision import Precision
from ..ranks import ALONE, Ranks
from ..refit.equations import Wanted
from ..task import Task
from .engine import Engine
from .reconstruction import Reconstructor, unfit
from .relevance import RelevanceScorer, check_relevance, relevance_scores
from .selection import Scorer


def unscorable(trace: Trace, groups: Sequence[Group], criterion: Criterion, batch: Batch | None) -> dict[str, str]:
    """Names of the groups that a criterion has no scores for -> why.

    Args:
        trace: of the network.
        groups: that may lose neurons.
        criterion: to score them by.
        batch: that they are scored on, if it is known yet.

    Raises:
        TypeError, ValueError: it has no scores for any group of this network, or on such batches.
    """
    if isinstance(criterion, FeatureRelevance):
        check_relevance(trace, groups, batch)
    if isinstance(criterion, Reconstruction):
        return {g.name: reason for g in groups if (reason := unfit(trace, g)) is not None}
    return {}


def scorer_of(
    criterion: Criterion,
    model: nn.Module,
    trace: Trace,
    group: Group,
    batch: Batch,
    task: Task,
    memory: int,
    *,
    wanted: Wanted | None = None,
    precision: Precision = "float32",
    ranks: Ranks = ALONE,
) -> Scorer:
    """What scores the neurons of a group while they are removed one by one.

    Args:
        criterion: to score by.
        model: pruned so far; removals are masked in it.
        trace: of its current state.
        group: one that :func:`unscorable` does not name; its indices count in the model as it is.
        batch: on the model's device.
        task: how the model is called and judged.
        memory: upper bound, in bytes, of the activations of a pass, met where samples can be split.
        wanted: the values that reconstruction compares with.
        precision: of the passes of an engine.
        ranks: that share them.
    """
    if isinstance(criterion, Reconstruction):
        assert wanted is not None
        return Reconstructor(model, trace, group, wanted)
    if isinstance(criterion, FeatureRelevance):
        return RelevanceScorer(model, trace, group, batch, task, memory)
    return Engine(model, trace, group, batch, task, memory, precision, ranks)


def scores_of(
    model: nn.Module,
    trace: Trace,
    groups: Sequence[Group],
    batch: Batch,
    task: Task,
    criterion: Criterion,
    memory: Memory,
    precision: Precision = "float32",
) -> list[Tensor]:
    """float64 [size] on the CPU for each group: the scores of its neurons in the network as it is.

    Args:
        model: whose weights are read; not modified.
        trace: of it.
        groups: of it, those that :func:`unscorable` does not name.
        batch: on the model's device.
        task: how the model is called and judged.
        criterion: to score by.
        memory: of a pass, met where samples can be split; what it comes down to holds from then on.
        precision: of the passes of an engine.

    Raises:
        TypeError, ValueError: the criterion has no finite scores on this batch.
    """
    if isinstance(criterion, FeatureRelevance):
        return relevance_scores(model, trace, groups, batch, task, criterion, memory)
    wanted = Wanted(model, trace, batch, task, memory.size) if isinstance(criterion, Reconstruction) else None
    found = []
    for group in groups:
        scorer = scorer_of(criterion, model, trace, group, batch, task, memory.size, wanted=wanted, precision=precision)
        found.append(scorer.scores(criterion))
        memory.size = scorer.memory
    return found
