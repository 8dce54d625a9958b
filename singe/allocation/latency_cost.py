"""What a network costs in time when its groups have lost some neurons: from measurements of some networks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from ..graph.groups import Group, module_of
from .cost import parameter_cost
from .isotonic import Rising

Lost = Sequence[int]
"""How many neurons each group has lost."""


class LatencyTable:
    """How long each module takes as a function of the share of its parameters that is left, whichever group lost them.

    A layer's time depends on the group that it reads and on the one that it writes, and so does the number of its
    parameters. Modules without parameters count with the one around them.

    Args:
        model: unpruned.
        groups: those that may lose neurons.
        measured: the networks that were measured, the unpruned one among them.
        seconds: for each, module name -> seconds that it takes without the modules that it calls.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        measured: Sequence[Lost],
        seconds: Sequence[Mapping[str, float]],
    ) -> None:
        self._elements = parameter_cost(model, groups)
        self._sizes: dict[str, int] = defaultdict(int)
        self._held: dict[str, list[str]] = defaultdict(list)  # module -> parameters in it of which groups own a part
        owned = self._elements.saved([0] * len(groups))
        for name, parameter in model.named_parameters():
            for module in _around(name):
                self._sizes[module] += parameter.numel()
                if name in owned:
                    self._held[module].append(name)
        points: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for removed, times in zip(measured, seconds, strict=True):
            for module, taken in self._with_parameters(times).items():
                points[module].append((self._left(module, self._elements.saved(removed)), taken))
        self._curves = {module: Rising(own) for module, own in points.items() if self._held[module]}

    def saved(self, removed: Lost) -> float:
        """Seconds that are saved."""
        gone = self._elements.saved(removed)
        return sum(curve(1.0) - curve(self._left(module, gone)) for module, curve in self._curves.items())

    def _left(self, module: str, gone: Mapping[str, int]) -> float:
        """The share of a module's parameters that is left."""
        return 1 - sum(gone[name] for name in self._held[module]) / self._sizes[module]

    def _with_parameters(self, times: Mapping[str, float]) -> dict[str, float]:
        """The same seconds, those of a module without parameters added to the one around it."""
        found: dict[str, float] = defaultdict(float)
        for name, seconds in times.items():
            while name not in self._sizes:
                name = module_of(name)
            found[name] += seconds
        return found


class LatencyCost:
    """Nanoseconds of a forward pass; see :class:`singe.allocation.cost.Cost`.

    The table's savings, module by module, are not what the whole network gains. :meth:`learn` is given that for some
    networks, and a curve through these points translates one into the other.

    Args:
        table: of the network.
        seconds: that the unpruned network takes.
        most: how many neurons each group may lose.
    """

    def __init__(self, table: LatencyTable, seconds: float, most: Lost) -> None:
        self.total = round(1e9 * seconds)
        self.grain = self.total // 200
        self._table = table
        self._learned = [(0.0, 0.0)]
        self._share = Rising(self._learned)
        alone = [table.saved([n * (i == part) for i, n in enumerate(most)]) for part in range(len(most))]
        self._units = [round(1e9 * s / max(1, n)) for s, n in zip(alone, most, strict=True)]

    def learn(self, removed: Lost, share: float) -> None:
        """Learns which share of the latency was gone when a network was measured as a whole."""
        self._learned.append((self._table.saved(removed), max(0.0, share)))
        self._share = Rising(self._learned)

    @property
    def shares(self) -> list[float]:
        """All that has been learned, in the order of removal."""
        return [share for _, share in sorted(self._learned)]

    def gone(self, removed: Lost) -> int:
        """See :class:`singe.allocation.cost.Cost`."""
        return round(self.total * self._share(self._table.saved(removed)))

    def unit(self, removed: Lost, part: int) -> int:
        """What a neuron of a group saves on average: time falls in steps, which one neuron triggers or does not."""
        return self._units[part]


def _around(name: str) -> list[str]:
    """The names of the modules that a parameter is in, the innermost first, the model's last."""
    modules = [module_of(name)]
    while modules[-1]:
        modules.append(module_of(modules[-1]))
    return modules
