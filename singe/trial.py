"""Trust, but check: before anything is pruned, removal is tried on copies and compared with masking."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .graph.groups import Group
from .graph.trace import forward, named_tensors
from .numerics import close
from .plan import Plan
from .surgery import compact, mask


def unsafe_groups(model: nn.Module, groups: Sequence[Group], x: Tensor) -> dict[str, str]:
    """The groups whose physical removal does not equal masking them, with the reason; an exported graph cannot know.

    Removes one neuron of every group, then in three rounds a sixth, a third and half of each in different orders, so
    that every neuron goes once and neighbouring groups lose different shares. A round that goes wrong is bisected, and
    repeated without the groups it found.

    Args:
        model: in eval mode; not modified.
        groups: of that model, not frozen, of at least two neurons.
        x: a few inputs.
    """
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(g.size, generator=generator) for g in groups]
    rounds = [[order[:1] for order in orders]]
    rounds += [[_share(order, (i + turn) % 3) for i, order in enumerate(orders)] for turn in range(3)]
    reasons: dict[str, str] = {}
    for removed in rounds:
        while True:
            pairs = zip(groups, removed, strict=True)
            found = _bisect(model, [(g, r) for g, r in pairs if g.name not in reasons and len(r)], x)
            if not found:
                break
            reasons |= found
    return reasons


def _share(order: Tensor, which: int) -> Tensor:
    """The first sixth, the next third, or the remaining half of an order."""
    cuts = [0, len(order) // 6, len(order) // 2, len(order)]
    part = order[cuts[which] : cuts[which + 1]]
    return part[: len(order) - 1]


def _bisect(model: nn.Module, chosen: list[tuple[Group, Tensor]], x: Tensor) -> dict[str, str]:
    problem = _problem(model, chosen, x) if chosen else None
    if problem is None:
        return {}
    if len(chosen) == 1:
        return {chosen[0][0].name: f"trial removal failed: {problem}"}
    middle = len(chosen) // 2
    found = _bisect(model, chosen[:middle], x) | _bisect(model, chosen[middle:], x)
    # harmless apart, harmful together: one half stays whole
    return found or {g.name: f"trial removal failed together with other groups: {problem}" for g, _ in chosen[middle:]}


def _problem(model: nn.Module, chosen: list[tuple[Group, Tensor]], x: Tensor) -> str | None:
    """Why the compacted network is not the masked one, or None."""
    masked, compacted, plan = copy.deepcopy(model), copy.deepcopy(model), Plan()
    for group, neurons in chosen:
        mask(masked, group.slices, neurons)
        plan.add(group, neurons.tolist())
    try:
        compact(compacted, plan.removed())
        return difference(masked, compacted, x) or _train_mode_problem(masked, compacted, x)
    except Exception as error:  # whatever the user's forward raises
        return _first_line(error)


@torch.no_grad()
def _train_mode_problem(masked: nn.Module, compacted: nn.Module, x: Tensor) -> str | None:
    """Why the compacted network does not train where the masked one does: train mode is not traced."""
    try:
        forward(masked.train(), x)
    except Exception:
        return None  # it never did
    try:
        forward(compacted.train(), x)
    except Exception as error:
        return f"in train mode, {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@torch.no_grad()
def difference(expected: nn.Module, actual: nn.Module, x: Tensor) -> str | None:
    """What differs between two networks' outputs on ``x``, or None where they agree."""
    a, b = pytree.tree_leaves(forward(expected, x)), pytree.tree_leaves(forward(actual, x))
    if len(a) != len(b):
        return f"the masked network has {len(a)} outputs, the compacted one {len(b)}"
    for e, g in zip(a, b, strict=True):
        if isinstance(e, Tensor) and not close(g, e):
            gap = float((g.double() - e.double()).abs().max()) if g.shape == e.shape else float("nan")
            return f"the outputs of the masked and the compacted network differ by {gap:.2e}"
    return None


def check_result(original: nn.Module, pruned: nn.Module, plan: Plan, x: Tensor) -> None:
    """Raises RuntimeError unless the pruned network equals the unpruned one with its weights and zeros elsewhere."""
    problem = difference(expanded(original, pruned, plan), pruned, x)
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
            if tensors[owner] is tensor:
                kept[dim][gone] = False
        index = [k.nonzero().view([-1 if i == dim else 1 for i in range(len(kept))]) for dim, k in enumerate(kept)]
        tensor.zero_()
        tensor[tuple(index)] = small[name]
    return full
