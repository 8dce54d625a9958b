"""Which channels of a network's activations can only be scaled and shifted together, and by which layers.

Every element of every activation belongs to a channel. An affine layer writes channels of its own; operators that move
or average elements pass them on, sums tie their scales, and everything else keeps the channels it reads and writes
unchanged. ``flow.py`` runs the graph on them, ``roots.py`` finds what a batch norm can be folded into.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..graph.mirrors import NO_PAIRS, NOBODY, collapsed, linked, pairs

ZERO = NOBODY
"""The channel of elements that are zero whatever happens, such as padding."""


@dataclass(frozen=True, eq=False)
class AffineLayer:
    """A call of a convolution, a linear layer or a batch norm in eval mode.

    Attributes:
        name: of the module.
        call: the node.
        reads: int64 [inputs]: the channel of each input channel.
        writes: int64 [outputs]: the channel of each output channel.
    """

    name: str
    call: fx.Node
    reads: Tensor
    writes: Tensor


@dataclass(frozen=True, eq=False)
class Obstacle:
    """Something that cannot follow a change of channels.

    Attributes:
        what: what it is, as part of a reason shown to the user.
        channels: int64: those that must not change because of it.
        shift_only: whether they can still be scaled.
        norm: name of the batch norm, if it is one; folding that removes the obstacle.
    """

    what: str
    channels: Tensor
    shift_only: bool
    norm: str | None


@dataclass(frozen=True, eq=False)
class Classes:
    """Which channels change alike, and what must hold between those that do not.

    Attributes:
        scale: int64 [channels]: equal where channels can only be scaled by the same factor.
        shift: int64 [channels]: equal where they can only be shifted by the same amount too.
        terms: int64 [relations, 3]: classes of ``shift``.
        coefficients: float64 [relations, 3]: of the shifts of ``terms`` in sums that must be zero.
        kept: int64 [n]: channels that some obstacle keeps unchanged.
        obstacle: int64 [n]: the index of each of these obstacles.
    """

    scale: Tensor
    shift: Tensor
    terms: Tensor
    coefficients: Tensor
    kept: Tensor
    obstacle: Tensor


class Channels:
    """Issues channels and remembers what ties them.

    Attributes:
        layers: those that can absorb a scale and a shift, in execution order.
        norms: the calls of every batch norm in eval mode, by its name.
        obstacles: in execution order.
    """

    def __init__(self) -> None:
        self.layers: list[AffineLayer] = []
        self.norms: dict[str, list[AffineLayer]] = defaultdict(list)
        self.obstacles: list[Obstacle] = []
        self._count = 1
        self._same: list[Tensor] = []
        self._level: list[Tensor] = []
        self._terms: list[Tensor] = []
        self._coefficients: list[Tensor] = []
        self._classes: Classes | None = None
        self.keep(torch.tensor([ZERO]), "zeros")

    def issue(self, count: int) -> Tensor:
        """int64 [count]: fresh channels."""
        self._count += count
        return torch.arange(self._count - count, self._count)

    def keep(self, channels: Tensor, what: str, *, shift_only: bool = False, norm: str | None = None) -> None:
        """Records that something cannot follow a change of ``channels``."""
        self.obstacles.append(Obstacle(what, torch.unique(*collapsed(channels)), shift_only, norm))

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Records that a[i] and b[i] change alike; channels of zeros can be scaled, but not shifted."""
        a, b = collapsed(a, b)
        for one, other in ((a, b), (b, a)):
            if (beside := one[(other == ZERO) & (one != ZERO)]).numel():
                self.keep(beside, "zeros among its positions", shift_only=True)
        self._same.append(pairs(a, b))

    def along(self, channels: Tensor, axis: int) -> Tensor:
        """int64 [size of ``axis``]: the channel of each index of an axis, everything else united."""
        axis = axis % channels.dim()
        return self.merged(channels, tuple(i for i in range(channels.dim()) if i != axis)).flatten()

    def merged(self, channels: Tensor, axes: Sequence[int]) -> Tensor:
        """Unites the channels along ``axes``, which are kept with size 1."""
        first = channels.amax(tuple(axes), keepdim=True) if axes else channels
        self.unite(channels, first.expand_as(channels))
        return first

    def weighted_sum(self, x: Tensor, y: Tensor, p: float, q: float) -> Tensor:
        """The channels of p x + q y, both of one shape: scaled like x and y, and shifted by the sum of their shifts."""
        a, b = collapsed(x, y)
        codes, index = torch.unique(a * self._count + b, return_inverse=True)
        a, b = codes // self._count, codes % self._count
        written = torch.where((a == ZERO) & (b == ZERO), ZERO, self.issue(len(codes)))
        self._level += [pairs(written, a), pairs(written, b)]
        self._terms.append(torch.stack([written, a, b], 1))
        self._coefficients.append(torch.tensor([[-1, p, q]], dtype=torch.float64).expand(len(codes), 3))
        return written[index].expand(x.shape)

    def fold(self, norm: str) -> None:
        """Removes a batch norm: the channels that its calls read and write are the same from now on."""
        self._classes = None
        for call in self.norms.pop(norm):
            self._same.append(pairs(call.reads, call.writes))
        self.layers = [layer for layer in self.layers if layer.name != norm]
        self.obstacles = [o for o in self.obstacles if o.norm != norm]

    def classes(self) -> Classes:
        """Of the channels, once the graph has run on them."""
        if self._classes is None:
            self._classes = self._classified()
        return self._classes

    def _classified(self) -> Classes:
        same, level = torch.cat([NO_PAIRS, *self._same], 1), torch.cat([NO_PAIRS, *self._level], 1)
        shift = linked(torch.arange(self._count), same)
        scale = linked(shift, level)
        terms = shift[torch.cat([torch.empty(0, 3, dtype=torch.int64), *self._terms])]
        coefficients = torch.cat([torch.empty(0, 3, dtype=torch.float64), *self._coefficients])
        twice = terms[:, 1] == terms[:, 2]
        coefficients[twice, 1] += coefficients[twice, 2]
        coefficients[twice, 2] = 0
        kept = [o.channels for o in self.obstacles]
        index = torch.arange(len(kept)).repeat_interleave(torch.tensor([len(k) for k in kept]))
        return Classes(scale, shift, terms, coefficients, torch.cat(kept), index)
