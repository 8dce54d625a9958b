"""What a network costs, in parameters or multiply-adds, when its groups have lost some neurons; or in weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ..graph.groups import Group
from ..graph.layer import is_layer, is_transposed
from ..graph.trace import Trace
from ..memory import raise_shortage
from ..models.copies import copy_of
from ..removal.plan import Plan


class Cost(Protocol):
    """The cost of a network whose parts lose units: groups lose neurons, or weight tensors single weights.

    Attributes:
        total: what the unpruned model costs.
        grain: costs that differ by less count as equal.
    """

    total: int
    grain: int

    def gone(self, removed: Sequence[int]) -> int:
        """What is saved when part i has lost removed[i] units."""

    def unit(self, removed: Sequence[int], part: int) -> int:
        """What one more unit of a part saves."""


class WeightCost:
    """The number of single weights: each costs one.

    Args:
        total: of all weights, including those that cannot be removed.
    """

    grain = 1

    def __init__(self, total: int) -> None:
        self.total = total

    def gone(self, removed: Sequence[int]) -> int:
        """See :class:`Cost`."""
        return sum(removed)

    def unit(self, removed: Sequence[int], part: int) -> int:
        """See :class:`Cost`."""
        return 1


class ElementCost:
    """A price for every element of every parameter; elements at a neuron's index along some axis go with the neuron.

    Args:
        model: the unpruned model.
        groups: the groups that may lose neurons.
        prices: of one element of each parameter, by the name under which the model lists it first.
        fixed: what the model costs in addition to its parameters' elements.
        products: what a neuron of each group saves of that; nothing by default.

    Attributes:
        total: what the unpruned model costs.
    """

    grain = 1

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        prices: Mapping[str, int],
        fixed: int = 0,
        products: Sequence[int] = (),
    ) -> None:
        canonical = {id(p): name for name, p in model.named_parameters()}
        names = {alias: canonical[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)}
        self._prices, self._products = prices, products or [0] * len(groups)
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        # parameter -> axis -> (group, indices that go with one neuron)
        self._owned: dict[str, dict[int, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for i, group in enumerate(groups):
            for s in group.slices:
                if prices.get(names.get(s.tensor, "")):
                    self._owned[names[s.tensor]][s.dim].append((i, s.multiplicity))
        self.total = fixed + sum(price * math.prod(self._shapes[name]) for name, price in prices.items())

    def gone(self, removed: Sequence[int]) -> int:
        """What is saved when group i has lost removed[i] neurons."""
        products = sum(count * each for count, each in zip(removed, self._products, strict=True))
        return sum(self.saved(removed).values()) + products

    def saved(self, removed: Sequence[int]) -> dict[str, int]:
        """The same for every parameter that has a price and of which some group owns a part."""
        return {name: self._saved(name, removed) for name in self._owned}

    def unit(self, removed: Sequence[int], part: int) -> int:
        """What one more neuron of a group saves."""
        more = list(removed)
        more[part] += 1
        return self.gone(more) - self.gone(removed)

    def _saved(self, name: str, removed: Sequence[int]) -> int:
        left = [
            size - sum(removed[i] * n for i, n in self._owned[name].get(dim, ()))
            for dim, size in enumerate(self._shapes[name])
        ]
        return self._prices[name] * (math.prod(self._shapes[name]) - math.prod(left))


def parameter_cost(model: nn.Module, groups: Sequence[Group]) -> ElementCost:
    """The number of parameters, tied ones counted once."""
    return ElementCost(model, groups, {name: 1 for name, _ in model.named_parameters()})


def mac_cost(
    model: nn.Module,
    groups: Sequence[Group],
    trace: Trace,
    macs_of: Callable[[nn.Module], int],
    whole: Collection[str] = (),
) -> ElementCost:
    """The multiply-adds for one sample: an element of a weight costs one at every position where it is used.

    Products of activations, as in attention, are in proportion to the neurons of the groups that they depend on; what
    a neuron saves of them is counted on copies without one.

    Args:
        model: the unpruned model.
        groups: the groups that may lose neurons.
        trace: of that model.
        macs_of: counts the multiply-adds of a network for one sample, as torch does.
        whole: names of groups that cannot lose any.
    """
    parameters, batch = dict(model.named_parameters()), trace.example_batch
    prices: dict[str, int] = defaultdict(int)
    for node in trace.nodes:
        weight = trace.parameter(node, 1, "weight") if is_layer(node) else None
        if weight in parameters:
            # for a transposed convolution, at every position of its input
            slid: Any = node.args[0] if is_transposed(node) else node
            prices[weight] += math.prod(trace.shape(slid, batch)) // (batch * len(parameters[weight]))
    fixed = macs_of(model) - sum(price * parameters[name].numel() for name, price in prices.items())
    cost = ElementCost(model, groups, prices, fixed)
    if not fixed:
        return cost
    products, counted = [0] * len(groups), _countable(model, macs_of, cost.total)
    for i, group in enumerate(groups):
        if group.size > 1 and group.frozen is None and group.name not in whole:
            narrower = Plan.of([(group, [0])]).apply(copy_of(counted))
            products[i] = max(0, cost.total - macs_of(narrower) - cost.unit([0] * len(groups), i))
    return ElementCost(model, groups, prices, fixed, products)


def _countable(model: nn.Module, macs_of: Callable[[nn.Module], int], macs: int) -> nn.Module:
    """A copy without values, which takes no time to run, if its multiply-adds can be counted; else the model."""
    try:
        empty = copy_of(model).to("meta")
        return empty if macs_of(empty) == macs else model
    except Exception as error:  # code that asks for values, such as a size in a tensor
        raise_shortage(error)
        return model
