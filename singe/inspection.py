"""What would be pruned, without pruning anything."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from . import checks, values
from .allocation.cost import Cost, mac_cost, parameter_cost
from .allocation.goal import left_alone
from .graph.fading import ends_elsewhere
from .graph.groups import Group, module_of
from .graph.trace import Forward, Trace, trace
from .models.isolation import plain_torch, preserved_random_state
from .models.weightnorm import without_weight_norms
from .models.wrappers import unwrapped
from .sizes import count_macs
from .survey import Survey, sample_inputs, survey
from .table import table
from .task import Task

_WIDTH = 140
_NAME = 32
_REMARK = 40


@dataclass(frozen=True)
class GroupInfo:
    """A group of interchangeable neurons.

    Attributes:
        name: of the group, that of its first layer.
        members: modules whose rows go with a neuron: the layers that write it, and the batch norms that ride along.
        readers: modules whose columns go with it.
        units: how many neurons there are.
        params_per_unit: parameters that go with one of them.
        macs_per_unit: multiply-adds for one sample that go with it.
        params_share, macs_share: shares of the whole model that are gone when this group alone is cut to one unit; in
            [0, 1].
        frozen: why the group is left whole, or None.
        note: anything else worth knowing, or None.
    """

    name: str
    members: tuple[str, ...]
    readers: tuple[str, ...]
    units: int
    params_per_unit: int
    macs_per_unit: int
    params_share: float
    macs_share: float
    frozen: str | None
    note: str | None


@dataclass(frozen=True, eq=False, repr=False)
class Inspection:
    """The groups of a network, as :func:`singe.prune` sees them; ``print`` it for a table.

    Attributes:
        groups: of coupled neurons, in execution order.
        unfollowed: modules with weights that are in no group -> why.
        params: parameters, tied ones counted once.
        macs: multiply-adds for one sample.
        removable_params, removable_macs: shares in [0, 1] that are gone when every prunable group keeps one unit: what
            ``rho`` can reach.
    """

    groups: tuple[GroupInfo, ...]
    unfollowed: dict[str, str]
    params: int
    macs: int
    removable_params: float
    removable_macs: float

    @property
    def prunable(self) -> tuple[GroupInfo, ...]:
        """The groups that may lose neurons."""
        return tuple(g for g in self.groups if g.frozen is None)

    @property
    def frozen(self) -> dict[str, str]:
        """Groups that are left whole and modules that are not followed -> why, as in ``PruneResult.frozen``."""
        return self.unfollowed | {g.name: g.frozen for g in self.groups if g.frozen is not None}

    def __repr__(self) -> str:
        header = ["group", "units", "read by", "params/unit", "macs/unit", "params", "macs", "left whole, or note"]
        rows = [_row(g) for g in self.groups]
        taken = len(table(header[:-1], [row[:-1] for row in rows]).partition("\n")[0]) + 2
        room = max(_REMARK, _WIDTH - taken)
        lines = [table(header, [[*row[:-1], _head(row[-1], room)] for row in rows], left=(0, 2, 7))]
        lines += [f"not followed: {name} ({reason})" for name, reason in self.unfollowed.items()]
        params, macs = (_floored(share) for share in (self.removable_params, self.removable_macs))
        lines.append(
            f"{len(self.prunable)} of {len(self.groups)} groups can be pruned: up to {params} of {self.params:,} "
            f"parameters, {macs} of {self.macs:,} multiply-adds"
        )
        return "\n".join(lines)


def inspect(
    model: nn.Module,
    example: Any,
    *,
    forward: Forward | None = None,
    ignore: Collection[str] = (),
    analysis_seconds: float = 600,
) -> Inspection:
    """Looks at a network as :func:`singe.prune` does before the first removal, trial removals on copies included.

    Args:
        model: not modified. If it is wrapped or compiled, the module inside is taken.
        example: inputs x [B, ...] of ``model(x)``, or whatever ``forward`` takes; a few samples are enough.
        forward: (model, example) -> outputs, for a model not called as ``model(x)``.
        ignore: module names or glob patterns; a group with a member among them is left alone.
        analysis_seconds: how long trial removals may take.

    Raises:
        TypeError, ValueError: bad input; see the message.
        TimeoutError: the trials take longer than ``analysis_seconds``.
    """
    model = unwrapped(model)
    values.patterns("ignore", ignore)
    values.positive("analysis_seconds", analysis_seconds)
    task, device = Task(forward), checks.sound_model(model)
    with plain_torch(device), torch.no_grad(), preserved_random_state():
        batch = checks.example(example, device, task)
        work = without_weight_norms(checks.working_copy(model))
        checks.runs(work, batch, task)
        graph = trace(work, task.inputs(batch), task.call)
        checks.own_weights(model, graph)
        sample = sample_inputs(batch, graph, task)
        found = survey(work, graph, sample, task, lambda groups: left_alone(model, groups, ignore), analysis_seconds)
        count = partial(count_macs, inputs=sample, forward=task.call)
        costs = parameter_cost(model, found.groups), mac_cost(work, found.groups, graph, count, found.whole)
        groups = tuple(_info(i, found, graph, costs) for i in range(len(found.groups)))
    able = {i: g.size - 1 for i, g in enumerate(found.groups) if g.name not in found.whole}
    reach = [_share(cost, found, able) for cost in costs]
    return Inspection(groups, found.unfollowed, costs[0].total, costs[1].total, *reach)


def _info(index: int, found: Survey, graph: Trace, costs: Iterable[Cost]) -> GroupInfo:
    group, nothing = found.groups[index], [0] * len(found.groups)
    frozen = found.whole.get(group.name)
    params, macs = (cost.unit(nothing, index) for cost in costs)
    params_share, macs_share = (_share(cost, found, {index: group.size - 1}) for cost in costs)
    return GroupInfo(
        name=group.name, members=group.members, readers=tuple(dict.fromkeys(map(module_of, group.readers))),
        units=group.size, params_per_unit=params, macs_per_unit=macs,
        params_share=params_share, macs_share=macs_share,
        frozen=frozen, note=_note(group, graph) if frozen is None else None,
    )  # fmt: skip


def _share(cost: Cost, found: Survey, removed: dict[int, int]) -> float:
    """The cost removed with {index of a group: number of neurons}, as a share of the whole."""
    return cost.gone([removed.get(i, 0) for i in range(len(found.groups))]) / cost.total if cost.total else 0.0


def _note(group: Group, graph: Trace) -> str | None:
    node = ends_elsewhere(graph, group)
    if node is None:
        return None
    packet: Any = getattr(node.target, "overloadpacket", node.target)
    others = ", ..." if len(node.all_input_nodes) > 1 else ""
    return f"fading ends at {packet.__name__}(0{others}), removal at nothing"


# -- as text -----------------------------------------------------------------------------------------------------


def _row(group: GroupInfo) -> list[str]:
    first = _tail(group.readers[0]) if group.readers else "-"
    more = f" +{len(group.readers) - 1}" if len(group.readers) > 1 else ""
    remark = group.frozen or group.note or ""
    return [
        _tail(group.name), f"{group.units:,}", first + more, f"{group.params_per_unit:,}", f"{group.macs_per_unit:,}",
        f"{group.params_share:.1%}", f"{group.macs_share:.1%}", remark,
    ]  # fmt: skip


def _floored(share: float) -> str:
    """A share that is within reach: never rounded up."""
    return f"{math.floor(1000 * share) / 1000:.1%}"


def _tail(name: str) -> str:
    """A name cut at the start, where names in a network differ least."""
    return name if len(name) <= _NAME else f"...{name[3 - _NAME :]}"


def _head(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 3]}..."
