"""Trust, but check: before anything is pruned, removal is tried on copies and compared with masking."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .graph.groups import Group
from .graph.trace import Forward, answer, first_line, named_tensors, plain
from .numerics import close
from .plan import Plan
from .surgery import compact, mask

Run = Callable[[nn.Module], Any]
"""A network -> its outputs on some fixed inputs."""


def unsafe_groups(model: nn.Module, groups: Sequence[Group], inputs: Any, forward: Forward = plain) -> dict[str, str]:
    """The groups whose physical removal does not equal masking them, with the reason; an exported graph cannot know.

    Removes one neuron of every group, then in three rounds a sixth, a third and half of each in different orders, so
    that every neuron goes once and neighbouring groups lose different shares. A round that goes wrong is bisected, and
    repeated without the groups it found.

    Args:
        model: in eval mode; not modified.
        groups: of that model, not frozen, of at least two neurons.
        inputs: a few samples.
        forward: how the model is called.
    """

    def run(network: nn.Module) -> Any:
        return answer(network, inputs, forward)

    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(g.size, generator=generator) for g in groups]
    rounds = [[order[:1] for order in orders]]
    rounds += [[_share(order, (i + turn) % 3) for i, order in enumerate(orders)] for turn in range(3)]
    reasons: dict[str, str] = {}
    for removed in rounds:
        while True:
            pairs = zip(groups, removed, strict=True)
            found = _bisect(model, [(g, r) for g, r in pairs if g.name not in reasons and len(r)], run)
            if not found:
                break
            reasons |= found
    return reasons


def _share(order: Tensor, which: int) -> Tensor:
    """The first sixth, the next third, or the remaining half of an order."""
    cuts = [0, len(order) // 6, len(order) // 2, len(order)]
    part = order[cuts[which] : cuts[which + 1]]
    return part[: len(order) - 1]


def _bisect(model: nn.Module, chosen: list[tuple[Group, Tensor]], run: Run) -> dict[str, str]:
    problem = _problem(model, chosen, run) if chosen else None
    if problem is None:
        return {}
    if len(chosen) == 1:
        return {chosen[0][0].name: f"trial removal failed: {problem}"}
    middle = len(chosen) // 2
    found = _bisect(model, chosen[:middle], run) | _bisect(model, chosen[middle:], run)
    # harmless apart, harmful together: one half stays whole
    return found or {g.name: f"trial removal failed together with other groups: {problem}" for g, _ in chosen[middle:]}


def _problem(model: nn.Module, chosen: list[tuple[Group, Tensor]], run: Run) -> str | None:
    """Why the compacted network is not the masked one, or None."""
    masked, compacted, plan = copy.deepcopy(model), copy.deepcopy(model), Plan()
    for group, neurons in chosen:
        mask(masked, group.slices, neurons)
        plan.add(group, neurons.tolist())
    try:
        compact(compacted, plan.removed())
        return difference(masked, compacted, run) or _train_mode_problem(masked, compacted, run)
    except Exception as error:  # whatever the user's forward raises
        return first_line(error)


@torch.no_grad()
def _train_mode_problem(masked: nn.Module, compacted: nn.Module, run: Run) -> str | None:
    """Why the compacted network does not train where the masked one does: train mode is not traced."""
    try:
        run(masked.train())
    except Exception:
        return None  # it never did
    try:
        run(compacted.train())
    except Exception as error:
        return f"in train mode, {first_line(error)}"
    return None


@torch.no_grad()
def difference(expected: nn.Module, actual: nn.Module, run: Run) -> str | None:
    """What differs between two networks' outputs, or None where they agree."""
    a, b = pytree.tree_leaves(run(expected)), pytree.tree_leaves(run(actual))
    if len(a) != len(b):
        return f"the masked network has {len(a)} outputs, the compacted one {len(b)}"
    for e, g in zip(a, b, strict=True):
        if isinstance(e, Tensor) and not close(g, e):
            gap = float((g.double() - e.double()).abs().max()) if g.shape == e.shape else float("nan")
            return f"the outputs of the masked and the compacted network differ by {gap:.2e}"
    return None


def check_result(original: nn.Module, pruned: nn.Module, plan: Plan, inputs: Any, forward: Forward = plain) -> None:
    """Raises RuntimeError unless the pruned network equals the unpruned one with its weights and zeros elsewhere."""
    full = expanded(original, pruned, plan)
    problem = difference(full, pruned, lambda network: answer(network, inputs, forward))
    if problem is not None:
        raise RuntimeError(f"the pruned network is not the masked one: {problem}; please report this model")


@torch.no_grad()
def expanded(original: nn.Module, pruned: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``original`` in eval mode that holds the pruned network's values, and zero where the plan cut."""
    full = copy.deepcopy(original).eval()
    tensors, small, seen, removed = named_tensors(full), named_tensors(pruned), set(), plan.removed()
    for name, tensor in tensors.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        kept = [torch.ones(n, dtype=torch.bool) for n in tensor.shape]
        for (owner, dim), gone in removed.items():
            if tensors.get(owner) is tensor:
                kept[dim][gone] = False
        index = [k.nonzero().view([-1 if i == dim else 1 for i in range(len(kept))]) for dim, k in enumerate(kept)]
        tensor.zero_()
        tensor[tuple(index)] = small[name]
    return full
