"""What a batch norm can be folded into: its roots and leaves.

A network's outputs stay the same when the channels of a stretch without non-linearities are scaled and shifted, as long
as all layers that write them, the roots, do so and all that read them, the leaves, undo it. A batch norm is no longer
needed once the channels before it are scaled and shifted as it does, or those after it the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.batchnorm import Affine
from .channels import ZERO, AffineLayer, Channels


class Unfoldable(Exception):
    """Why a batch norm stays, as shown to the user."""


@dataclass(frozen=True, eq=False)
class Change:
    """A channel x becomes x' = scale x + shift, and its readers recover x as factor x' - offset.

    All float64 [channels], with scale = 1 / factor and shift = scale offset. Some are infinite where a factor is 0.
    """

    scale: Tensor
    shift: Tensor
    factor: Tensor
    offset: Tensor

    def concerns(self, layer: AffineLayer) -> bool:
        """Whether channels that a layer reads or writes change."""
        written, read = layer.writes, layer.reads
        scaled = torch.cat([self.scale[written], self.factor[read]]) != 1
        return bool(scaled.any() or torch.cat([self.shift[written], self.offset[read]]).any())

    def fits(self, layer: AffineLayer) -> bool:
        """Whether a layer can follow, which it cannot where it would have to undo a scale of zero."""
        written, read = layer.writes, layer.reads
        numbers = [self.scale[written], self.shift[written], self.factor[read], self.offset[read]]
        return bool(torch.cat(numbers).isfinite().all())


def change_without(channels: Channels, norm: str, affine: Affine) -> Change:
    """The change of channels with which a network does without a batch norm, at all of its calls.

    Args:
        channels: of the network.
        norm: name of the batch norm.
        affine: what it computes, in float64.

    Raises:
        Unfoldable: there is none; names the obstacles before and after the batch norm.
    """
    search = _Search(channels, norm, affine)
    calls = [{side: search.blocked(call, side) for side in (True, False)} for call in channels.norms[norm]]
    for met in calls:
        if all(met.values()):
            raise Unfoldable(_meets(met))
    met = calls[0]
    for in_front in (True, False):
        sides = [in_front if side[in_front] is None else not in_front for side in calls]
        try:
            return search.change(sides)
        except Unfoldable as obstacle:
            met = {**met, sides[0]: str(obstacle)}
    raise Unfoldable(_meets(met))


def _meets(met: dict[bool, str | None]) -> str:
    return f"before it comes {met[True]}; after it comes {met[False]}"


class _Search:
    """A search for the change on either side of a batch norm; arguments as of :func:`change_without`."""

    def __init__(self, channels: Channels, norm: str, affine: Affine) -> None:
        calls = channels.norms[norm]
        self._classes = channels.classes()
        self._obstacles = channels.obstacles
        self._others = torch.tensor([o.norm != norm for o in channels.obstacles])
        self._shift_only = torch.tensor([o.shift_only for o in channels.obstacles])
        self._layers = [layer for layer in channels.layers if layer.name != norm]
        self._reads, self._writes = torch.cat([c.reads for c in calls]), torch.cat([c.writes for c in calls])
        self._scale, self._shift = (t.cpu().repeat(len(calls)) for t in (affine.scale, affine.shift))

    def blocked(self, call: AffineLayer, in_front: bool) -> str | None:
        """What keeps channels before a call, or after it, from being scaled; None where nothing does."""
        return self._first_obstacle(self._marked(call.reads if in_front else call.writes), shift_only=False)

    def change(self, in_front: Sequence[bool]) -> Change:
        """The change on one side of every call.

        Raises:
            Unfoldable: names the obstacle there.
        """
        front = torch.tensor(in_front).repeat_interleave(len(self._reads) // len(in_front))
        chosen, other = self._chosen(front), self._chosen(~front)
        scale, factor = self._scales(front, chosen)
        moved = self._marked(chosen)
        if moved[self._classes.scale[other]].any():
            raise Unfoldable("the batch norm itself")
        for layer in self._layers:
            if all(moved[self._classes.scale[side]].any() for side in (layer.reads, layer.writes)):
                raise Unfoldable(f"{layer.name}, which both reads and writes what would be scaled")
        value = _solved(*self._sums(front, chosen, other))
        if value is None:
            raise Unfoldable(self._first_obstacle(moved, shift_only=True) or "sums that its shift cannot pass")
        # a value is the offset where channels after the batch norm are scaled, and the shift elsewhere
        value, behind = value[self._classes.shift], self._marked(chosen[~front])[self._classes.scale]
        shift, offset = torch.where(behind, value * scale, value), torch.where(behind, value, value * factor)
        change = Change(scale, shift, factor, offset)
        for layer in self._layers:
            if change.concerns(layer) and not change.fits(layer):
                raise Unfoldable(f"{layer.name}, which would have to undo a scale of zero")
        return change

    def _chosen(self, front: Tensor) -> Tensor:
        return torch.where(front, self._reads, self._writes)

    def _scales(self, front: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and factor of every channel, where the batch norm's scale moves to ``chosen``."""
        classes, wanted = self._classes.scale, torch.where(front, self._scale, 1 / self._scale)
        scale, factor = torch.ones(2, len(classes), dtype=torch.float64)
        scale[classes[chosen]] = wanted
        factor[classes[chosen]] = torch.where(front, 1 / self._scale, self._scale)
        apart = (scale[classes[chosen]] != wanted).nonzero().flatten()
        if len(apart):
            raise Unfoldable(self._tie(classes[chosen], wanted, int(classes[chosen][apart].min())))
        return scale[classes], factor[classes]

    def _tie(self, classes: Tensor, wanted: Tensor, shared: int) -> str:
        """What ties channels of the batch norm that are of one class but not of one scale."""
        index = (classes == shared).nonzero().flatten()
        other = index[wanted[index] != wanted[index[0]]][0]
        ties = (y for y in self._layers if (self._classes.scale[torch.cat([y.writes, y.reads])] == shared).any())
        name = next((layer.name for layer in ties), "an operator")
        first, second = (int(i) % len(self._scale) for i in (index[0], other))
        return f"{name}, for which its channels {first} and {second} are one"

    def _sums(self, front: Tensor, chosen: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The conditions on shifts, as arguments of :func:`_solved`.

        Before the batch norm, x + shift replaces x, and scale x + its own shift replaces y.
        """
        classes, one, none = self._classes, torch.ones_like(self._scale), torch.zeros_like(self._scale)
        terms = classes.shift[torch.stack([chosen, other, torch.full_like(chosen, ZERO)], 1)]
        mine = [torch.where(front, one, -one), torch.where(front, -one, self._scale), none]
        fixed = torch.zeros(len(classes.shift), dtype=torch.bool)
        fixed[classes.shift[classes.kept[self._others[classes.obstacle]]]] = True
        return (
            torch.cat([terms, classes.terms]),
            torch.cat([torch.stack(mine, 1), classes.coefficients]),
            torch.cat([self._shift, torch.zeros(len(classes.terms), dtype=torch.float64)]),
            fixed,
        )

    def _marked(self, channels: Tensor) -> Tensor:
        """Bool [classes]: which classes of one scale ``channels`` are of."""
        marked = torch.zeros(len(self._classes.scale), dtype=torch.bool)
        marked[self._classes.scale[channels]] = True
        return marked

    def _first_obstacle(self, marked: Tensor, shift_only: bool) -> str | None:
        """The first obstacle among classes other than the batch norm itself."""
        index = self._classes.obstacle
        counts = self._others[index] & (self._shift_only[index] == shift_only)
        found = index[counts & marked[self._classes.scale[self._classes.kept]]]
        return self._obstacles[int(found.min())].what if len(found) else None


def _solved(terms: Tensor, coefficients: Tensor, total: Tensor, fixed: Tensor) -> Tensor | None:
    """Values for which weighted sums have given totals, zero where possible; None if none are found.

    Args:
        terms: int64 [sums, 3]: which values are added up.
        coefficients: float64 [sums, 3].
        total: float64 [sums].
        fixed: bool [values]: those that are zero.
    """
    value, fixed = torch.zeros(len(fixed), dtype=torch.float64), fixed.clone()
    while True:
        gap = total - (coefficients * value[terms]).sum(1)
        gap[gap.abs() <= 1e-12 * total.abs().max()] = 0
        free = ~fixed[terms] & (coefficients != 0)
        forced = free.sum(1) == 1  # forced values are set before any is chosen
        rows = (forced if forced.any() else gap.bool() & free.any(1)).nonzero().flatten()
        if not len(rows):
            return None if gap.any() else value
        place = free[rows].int().argmax(1, keepdim=True)
        index, first = _distinct(terms[rows].gather(1, place).flatten())
        rows, place = rows[first], place[first]
        value[index] += gap[rows] / coefficients[rows].gather(1, place).flatten()
        fixed[index] = True


def _distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ones of a vector of integers, and where each comes first."""
    found, inverse = torch.unique(values, return_inverse=True)
    places = torch.full_like(found, len(values))
    return found, places.scatter_reduce(0, inverse, torch.arange(len(values)), "amin")
