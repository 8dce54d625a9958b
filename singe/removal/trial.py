"""Trust, but check: before anything is pruned, removal is tried on copies and compared with masking."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.export import first_line
from ..graph.groups import Group, module_of, own_name
from ..graph.trace import Forward, answer, named_tensors, plain_call
from ..memory import raise_shortage
from ..models.copies import copy_of
from ..models.numerics import close
from ..models.outputs import leaves
from ..models.weightnorm import plain_copy
from .plan import Plan
from .stand_in import cast, stand_in
from .surgery import compact, mask

log = logging.getLogger("singe")

Chosen = list[tuple[Group, Tensor]]
"""Groups, and the neurons (int64) to remove of each."""

Verdict = Callable[[Chosen], str | None]
"""Why removal goes wrong, or None."""


class Trials:
    """Tries removal on copies of a network.

    Args:
        model: in eval mode; not modified.
        inputs: a few samples.
        forward: how the model is called.
        seconds: how long all trials together may take.
        began: the time on ``time.monotonic`` from which that counts; now by default.
        told: called at every trial.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        forward: Forward = plain_call,
        seconds: float = math.inf,
        began: float | None = None,
        told: Callable[[], object] = lambda: None,
    ) -> None:
        self._given, self._inputs, self._forward = model, inputs, forward
        self._model, self._sample = stand_in(model, inputs, forward)
        self._seconds, self._began = seconds, time.monotonic() if began is None else began
        self._told = told

    def unsafe(self, groups: Sequence[Group]) -> dict[str, str]:
        """The groups whose physical removal does not equal masking them -> why; an exported graph cannot know.

        Removes one neuron of every group, then in three rounds a sixth, a third and half of each in different orders,
        so that every neuron is removed once and neighbouring groups lose different shares. If a round fails, the groups
        at fault are found and it is repeated without them.

        Args:
            groups: of the model, not frozen, of at least two neurons.

        Raises:
            TimeoutError: the trials take longer than they may.
        """
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(g.size, generator=generator) for g in groups]
        rounds = [[order[:1] for order in orders]]
        rounds += [[_share(order, (i + turn) % 3) for i, order in enumerate(orders)] for turn in range(3)]
        reasons: dict[str, str] = {}
        for turn, removed in enumerate(rounds):
            # code that asks for widths fails from the first neuron on, so that two rounds in train mode are enough
            verdicts = (self._difference, self._training_problem)[: 2 if turn in (0, len(rounds) - 1) else 1]
            for verdict in verdicts:
                pairs = list(zip(groups, removed, strict=True))
                while found := self._guilty([(g, r) for g, r in pairs if g.name not in reasons and len(r)], verdict):
                    reasons |= found
        return reasons

    def _guilty(self, chosen: Chosen, verdict: Verdict) -> dict[str, str]:
        """Some of the groups that are to blame, if all together fail."""
        if not chosen or (problem := verdict(chosen)) is None:
            return {}
        return self._guilty_kinds(chosen, verdict) or self._bisect(chosen, problem, verdict)

    def _guilty_kinds(self, chosen: Chosen, verdict: Verdict) -> dict[str, str]:
        """Groups of layers in the same place of modules of one class, where the first and the last of them fail."""
        kinds: dict[Any, Chosen] = defaultdict(list)
        for group, neurons in chosen:
            kinds[self._kind(group)].append((group, neurons))
        reasons: dict[str, str] = {}
        for members in (m for m in kinds.values() if len(m) > 2):
            (first, _), problem = members[0], verdict(members[:1])
            if problem is not None and verdict(members[-1:]) is not None:
                reasons |= {
                    g.name: f"trial removal of {first.name} (of the same kind) failed: {problem}" for g, _ in members
                }
                reasons[first.name] = f"trial removal failed: {problem}"
        return reasons

    def _kind(self, group: Group) -> Any:
        """What groups have in common that are built by the same piece of code."""
        parent, _, own = module_of(group.writers[0]).rpartition(".")
        roles = tuple((s.role, s.dim, own_name(s.tensor)) for s in group.slices)
        return type(self._model.get_submodule(parent)), own, roles

    def _bisect(self, chosen: Chosen, problem: str, verdict: Verdict) -> dict[str, str]:
        if len(chosen) == 1:
            return {chosen[0][0].name: f"trial removal failed: {problem}"}
        middle = len(chosen) // 2
        halves = chosen[:middle], chosen[middle:]
        problems = [verdict(half) for half in halves]
        found: dict[str, str] = {}
        for half, its_own in zip(halves, problems, strict=True):
            found |= self._bisect(half, its_own, verdict) if its_own is not None else {}
        # harmless apart, harmful together: one half stays whole
        return found or {g.name: f"trial removal failed together with other groups: {problem}" for g, _ in halves[1]}

    def _difference(self, chosen: Chosen) -> str | None:
        """Why the compacted network does not answer as the masked one does, or None."""
        self._begin()
        try:
            # first what fails
            outputs = self._run(_compacted(self._model, chosen), self._sample)
            return difference(self._run(_masked(self._model, chosen), self._sample), outputs)
        except Exception as error:  # whatever the user's forward raises
            raise_shortage(error)
            return _problem(error)

    def _training_problem(self, chosen: Chosen) -> str | None:
        """Why the compacted network does not run in train mode, which is not traced, where the masked one does."""
        self._begin()
        try:
            self._run(_compacted(self._given, chosen).train(), self._inputs)
        except Exception as error:
            raise_shortage(error)
            with contextlib.suppress(Exception):
                self._run(_masked(self._given, chosen).train(), self._inputs)
                return f"in train mode, {_problem(error)}"
        return None

    def _begin(self) -> None:
        self._told()
        if time.monotonic() - self._began > self._seconds:
            raise TimeoutError(
                f"expected to find out within {self._seconds:g} s what can be removed from "
                f"{type(self._model).__name__}, and did not: give fewer or smaller samples, or ignore= parts of it"
            )

    @torch.no_grad()
    def _run(self, network: nn.Module, inputs: Any) -> Any:
        return answer(network, inputs, self._forward)


def _problem(error: Exception) -> str:
    """What a smaller network fails at; torch does not say of a view that its shape is fixed."""
    line = first_line(error)
    return (
        f"a view or reshape has a fixed number of channels: {line}" if "is invalid for input of size" in line else line
    )


def _compacted(model: nn.Module, chosen: Chosen) -> nn.Module:
    network = copy_of(model)
    compact(network, Plan.of((group, neurons.tolist()) for group, neurons in chosen).removed())
    return network


def _masked(model: nn.Module, chosen: Chosen) -> nn.Module:
    network = copy_of(model)
    for group, neurons in chosen:
        mask(network, group.slices, neurons)
    return network


def _share(order: Tensor, which: int) -> Tensor:
    """The first sixth, the next third, or the remaining half of an order."""
    cuts = [0, len(order) // 6, len(order) // 2, len(order)]
    part = order[cuts[which] : cuts[which + 1]]
    return part[: len(order) - 1]


@torch.no_grad()
def difference(expected: Any, actual: Any) -> str | None:
    """What differs between the outputs of the masked and the compacted network, or None where they agree."""
    a, b = leaves(expected), leaves(actual)
    if len(a) != len(b):
        return f"the masked network has {len(a)} outputs, the compacted one {len(b)}"
    for e, g in zip(a, b, strict=True):
        if isinstance(e, Tensor) != isinstance(g, Tensor):
            return f"the masked network returns {type(e).__name__} where the compacted one returns {type(g).__name__}"
        if isinstance(e, Tensor) and not close(g, e):
            gap = float((g.double() - e.double()).abs().max()) if g.shape == e.shape else float("nan")
            return f"the outputs of the masked and the compacted network differ by {gap:.2e}"
    return None


@torch.no_grad()
def check_result(
    original: nn.Module, pruned: nn.Module, plan: Plan, inputs: Any, forward: Forward = plain_call
) -> None:
    """Raises RuntimeError unless the pruned network equals the unpruned one with its weights and zeros elsewhere.

    Where they differ, they are compared in float64, too, if they compute in it: rounding can decide an argmax.
    """
    full = expanded(original, pruned, plan)
    problem = difference(*(answer(network, inputs, forward) for network in (full, pruned)))
    if problem is None:
        return
    try:
        doubled = [answer(copy_of(n).double(), cast(inputs, torch.float64), forward) for n in (full, pruned)]
        rounding = difference(*doubled) is None
    except Exception as error:  # whatever the user's forward raises in another dtype
        raise_shortage(error)
        rounding = False
    if not rounding:
        raise RuntimeError(f"the pruned network is not the masked one: {problem}; please report this model")
    log.warning("%s, but not in float64, so that it seems to be rounding", problem)


@torch.no_grad()
def expanded(original: nn.Module, pruned: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``original`` in eval mode that holds the pruned network's values, and zero where the plan cut."""
    full = plain_copy(original).eval()
    tensors, small, seen = named_tensors(full), named_tensors(plain_copy(pruned)), set[int]()
    cuts_of: dict[int, dict[int, Tensor]] = defaultdict(dict)
    for (owner, dim), gone in plan.removed().items():
        if owner in tensors:
            cuts_of[id(tensors[owner])][dim] = gone
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if not (cuts := cuts_of.get(id(tensor))):
            tensor.copy_(small[name])
            continue
        kept = [torch.ones(n, dtype=torch.bool) for n in tensor.shape]
        for dim, gone in cuts.items():
            kept[dim][gone] = False
        index = [k.nonzero().view([-1 if i == dim else 1 for i in range(len(kept))]) for dim, k in enumerate(kept)]
        tensor.zero_()
        tensor[tuple(index)] = small[name]
    return full
