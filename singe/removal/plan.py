"""What was removed, in the coordinates of the model before any removal."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import typed
from ..graph.groups import Group, Slice
from ..graph.trace import named_tensors
from ..models.weightnorm import WeightNorm, plain_copy, weight_norms, with_weight_norms, without_weight_norms
from ..models.wrappers import unwrapped
from .surgery import compact, named_integers

VERSION = 1


@dataclass(frozen=True)
class Cut:
    """What is removed along one axis of a parameter or buffer, or from a width that a module keeps as an attribute.

    Attributes:
        tensor: its qualified name; or that of an integer attribute of a module, which is its length.
        axis: the axis.
        size: how long the axis is in the unpruned model.
        indices: those to remove, ascending.
    """

    tensor: str
    axis: int
    size: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Removal:
    """One group's part of a plan.

    Attributes:
        group: the group's name.
        size: how many neurons it had.
        neurons: those removed, in the order of removal.
        cuts: what is removed with them.
    """

    group: str
    size: int
    neurons: tuple[int, ...]
    cuts: tuple[Cut, ...]


@dataclass(repr=False)
class Plan:
    """Which neurons were removed, and which parts of each tensor with them; independent of any export.

    Every index counts in the unpruned model, so a plan applies to a fresh copy of that model.

    Attributes:
        removals: of each group that lost neurons, in order.
    """

    removals: list[Removal] = field(default_factory=list)

    @classmethod
    def of(cls, removed: Iterable[tuple[Group, Sequence[int]]]) -> Plan:
        """The plan that removes some neurons of each of some groups, whose slices count in the unpruned model."""
        plan = cls()
        for group, neurons in removed:
            plan.add(group, neurons)
        return plan

    def __repr__(self) -> str:
        neurons = sum(len(removal.neurons) for removal in self.removals)
        return f"Plan(removals=[{len(self.removals)} groups, {neurons} neurons])"

    def add(self, group: Group, neurons: Sequence[int]) -> Removal:
        """Records the removal of ``neurons`` of ``group``, whose slices count in the unpruned model."""
        gone = torch.tensor(neurons, dtype=torch.int64)
        cuts = tuple(Cut(s.tensor, s.dim, len(s.neuron), tuple(s.indices(gone).tolist())) for s in group.slices)
        removal = Removal(group.name, group.size, tuple(neurons), cuts)
        self.removals.append(removal)
        return removal

    def removed(self) -> dict[tuple[str, int], Tensor]:
        """(tensor name, axis) -> all indices to remove, ascending."""
        gathered: dict[tuple[str, int], list[int]] = {}
        for removal in self.removals:
            for cut in removal.cuts:
                gathered.setdefault((cut.tensor, cut.axis), []).extend(cut.indices)
        return {axis: torch.tensor(sorted(indices), dtype=torch.int64) for axis, indices in gathered.items()}

    def rebase(self, group: Group) -> Group:
        """The group as it stands in a model from which this plan's neurons are gone; the group lost none itself."""
        removed = self.removed()

        def shrink(s: Slice) -> Slice:
            keep = torch.ones(len(s.neuron), dtype=torch.bool)
            keep[removed.get((s.tensor, s.dim), torch.empty(0, dtype=torch.int64))] = False
            return replace(s, neuron=s.neuron[keep])

        return replace(group, slices=tuple(shrink(s) for s in group.slices))

    def apply(self, model: nn.Module, *optimizers: Optimizer) -> nn.Module:
        """Cuts the planned neurons out of ``model`` in place and returns it; gradients are dropped.

        Args:
            model: unpruned, like the one that the plan was made for. If it is wrapped or compiled, the module inside is
                cut and returned; DistributedDataParallel has to be put around it again. If a module has a ``train`` of
                its own, the model is put into train mode and back, so that what was kept of old weights is dropped.
            optimizers: of this model's parameters, possibly among others: from now on they hold the smaller ones, with
                their state for each element that stays (momentum and the like), so that training can continue. The
                averages over rows and columns of torch.optim.Adafactor stay, too.

        Raises:
            TypeError: not an optimiser.
            ValueError: the plan does not fit the model, or an optimiser holds none of the model's parameters or has
                state other than a value per element, such as averages, if it is not torch.optim.Adafactor. Nothing is
                changed then.
        """
        model = unwrapped(model)
        norms = weight_norms(model)
        for optimizer in optimizers:
            _check_optimizer(optimizer, model, norms)
        if norms:  # taken off and put back they are new parameters, so that the plan has to fit a copy first
            self._apply(plain_copy(model))
        self._apply(without_weight_norms(model), *optimizers)
        return with_weight_norms(model, norms)

    def _apply(self, model: nn.Module, *optimizers: Optimizer) -> None:
        shapes: dict[str, tuple[int, ...]] = {name: (value,) for name, value in named_integers(model).items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
        for cut in (cut for removal in self.removals for cut in removal.cuts):
            shape = shapes.get(cut.tensor, ())
            if not (cut.axis < len(shape) and shape[cut.axis] == cut.size):
                raise ValueError(
                    f"expected a model whose {cut.tensor} is {cut.size} long on axis {cut.axis}, as the one that was "
                    f"pruned, got {f'shape {shape}' if shape else 'no such tensor'}"
                )
        compact(model, self.removed(), *optimizers)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json``; see :meth:`from_json`."""
        return {"format": "singe-plan", "version": VERSION, "removals": typed.as_data(self.removals)}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            ValueError: not a plan, of another version, or with a field of the wrong kind.
        """
        if not isinstance(data, dict) or data.get("format") != "singe-plan":
            raise ValueError("expected a singe plan (a JSON object with format 'singe-plan')")
        if data.get("version") != VERSION:
            raise ValueError(f"expected a plan of version {VERSION}, got version {reprlib.repr(data.get('version'))}")
        try:
            removals = _read_removals(data.get("removals"), "removals")
            for removal in removals:
                _check_indices(removal.neurons, removal.size)
                for cut in removal.cuts:
                    _check_indices(cut.indices, cut.size)
                    if list(cut.indices) != sorted(cut.indices):
                        raise ValueError("expected ascending indices")
        except ValueError as error:
            raise ValueError(f"damaged plan: {error}") from error
        return cls(list(removals))


def _check_optimizer(optimizer: Optimizer, model: nn.Module, norms: Sequence[WeightNorm]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected an optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if norms:
        raise ValueError(
            f"expected a model without weight norms, which no optimizer's state follows, got one in {norms[0].module}"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise ValueError(
            f"expected an optimizer of the model's own parameters, got {type(optimizer).__name__} of none of them "
            "(of a copy's, perhaps)"
        )


_read_removals = typed.reader(tuple[Removal, ...])


def _check_indices(indices: Sequence[int], size: int) -> None:
    """Raises ValueError unless they are different ones below ``size``."""
    if len(set(indices)) != len(indices):
        raise ValueError(f"repeated indices in {reprlib.repr(indices)}")
    if indices and max(indices) >= size:
        raise ValueError(f"expected indices below {size}, got {max(indices)}")
