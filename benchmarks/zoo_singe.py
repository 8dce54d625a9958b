"""A model of the zoo through singe: what can be pruned, and the result of pruning it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo_checks import Inputs, described, largest_difference, squares, training_problem
from zoo_models import MODELS, lively

import singe
from singe.graph.trace import Forward
from singe.removal.trial import expanded
from singe.sizes import count_parameters

SHARES = (0.3, 0.6)
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Analysis:
    """The parts of a model.

    Attributes:
        params, macs: of the whole model; multiply-adds for one sample.
        groups: of coupled neurons that can lose some.
        units: neurons of all groups, and the rows of layers that belong to none.
        frozen: why some of these stay -> how many.
        removable: share of the parameters that is gone when every group keeps one neuron.
        seconds: of the whole analysis, trial removal included.
    """

    params: int
    macs: int
    groups: int
    units: int
    frozen: dict[str, int]
    removable: float
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """The outcome of :func:`singe.prune`.

    Attributes:
        rho: of all parameters.
        seconds: of the call.
        params, macs: shares that are gone.
        difference: the largest between the outputs of the result and of the masked model, relative to the largest.
        problem: the first thing that is wrong with the result; None if nothing is.
    """

    rho: float
    seconds: float
    params: float
    macs: float
    difference: float
    problem: str | None


def measure(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("analysis", an :class:`Analysis`), then for each of :data:`SHARES` (it, a :class:`Pruned`).

    A step that fails yields {"problem": why} instead.
    """
    model, inputs = lively(name)
    try:
        analysis = inspected(model, inputs)
    except Exception as error:  # a library at fault is a finding
        yield "analysis", {"problem": described(error)}
        return
    yield "analysis", asdict(analysis)
    if analysis.removable:
        for share in SHARES:
            try:
                yield str(share), asdict(pruned(name, model, inputs, share * analysis.removable))
            except Exception as error:
                yield str(share), {"problem": described(error)}


def spread(model: nn.Module, inputs: Inputs) -> Any:
    """How models of several inputs are called."""
    return model(*inputs)


def inspected(model: nn.Module, inputs: Inputs) -> Analysis:
    """What :func:`singe.inspect` finds."""
    start = time.perf_counter()
    found = singe.inspect(model, tuple(inputs), forward=spread)
    seconds = time.perf_counter() - start
    counts: Counter[str] = Counter()
    for group in found.groups:
        if group.frozen is not None:
            counts[_kind(group.frozen, model)] += group.units
    for name, reason in found.unfollowed.items():
        counts[_kind(reason, model)] += _rows(model, name)
    return Analysis(
        params=count_parameters(model), macs=found.macs, groups=len(found.prunable),
        units=sum(g.units for g in found.prunable) + counts.total(), frozen=dict(counts.most_common()),
        removable=found.removable_params, seconds=seconds,
    )  # fmt: skip


def _kind(reason: str, model: nn.Module) -> str:
    """A reason without this model's names and numbers, so that equal ones are counted together."""
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters(), *model.named_buffers())}
    general = " ".join("…" if word in names else word for word in reason.split()).removesuffix(" in …")
    return re.sub(r"\b\d+\b", "n", general)


def _rows(model: nn.Module, name: str) -> int:
    """Rows of the largest matrix in a layer that is in no group, or of a bare parameter; a scale has none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = [p for n, p in parameters.items() if n == name or n.startswith(f"{name}.")]
    return max((len(p) for p in own if p[0].numel() > 1), default=0)


def pruned(name: str, model: nn.Module, inputs: Inputs, rho: float) -> Pruned:
    """Prunes by magnitude, without training, and checks the result."""
    start = time.perf_counter()
    result = singe.prune(
        model, [batch(name, inputs)], rho, criterion="magnitude", finetune=None, images=len(inputs[0]),
        allocation="uniform", compensate="none", progress=False, **manner(name),
    )  # fmt: skip
    seconds = time.perf_counter() - start
    difference = largest_difference(result.model, expanded(model, result.model, result.plan), inputs)
    problem = None if difference <= TOLERANCE else f"differs from the masked model by {difference:.1e}"
    problem = problem or training_problem(result.model, inputs, model)
    return Pruned(rho, seconds, result.params_removed, result.macs_removed, difference, problem)


def manner(name: str) -> dict[str, Any]:
    """Arguments that tell :func:`singe.prune` how to call and judge a model; none for a classifier of one input."""
    entry = MODELS[name]
    several: dict[str, Forward] = {"forward": spread} if len(entry.shapes) > 1 else {}
    return several | ({} if entry.classes and not several else {"loss": squares})


def batch(name: str, inputs: Inputs) -> tuple[Tensor, ...]:
    """All inputs if there are several, otherwise the only one with labels for it."""
    if len(inputs) > 1:
        return tuple(inputs)
    return inputs[0], torch.randint(MODELS[name].classes or 1, (len(inputs[0]),))
