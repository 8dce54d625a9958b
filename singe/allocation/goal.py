"""How much to remove and from where: the parts of a network that may lose units, and how many each will lose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from textwrap import shorten
from typing import Any, Literal, get_args

from torch import Tensor, nn

from .. import values
from ..graph.groups import Group
from ..graph.trace import Trace
from . import schedules
from .cost import Cost, mac_cost, parameter_cost
from .fit import check_reach, fit, removable
from .parts import Part, named_parts

Target = Literal["params", "macs", "latency"]
Allocation = str | Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """The arguments of :func:`singe.prune` that decide widths; see there.

    Raises:
        TypeError, ValueError: bad values.
    """

    rho: float
    target: Target
    allocation: Allocation
    round_to: int
    ignore: Collection[str]
    latency_batch: int = 1
    max_rate: float = 1

    def __post_init__(self) -> None:
        values.fraction("rho", self.rho)
        values.choice("target", self.target, get_args(Target))
        schedules.check(self.allocation)
        values.integer("round_to", self.round_to, 1)
        values.patterns("ignore", self.ignore)
        values.integer("latency_batch", self.latency_batch, 1)
        if not 0 < values.number("max_rate", self.max_rate) <= 1:
            raise ValueError(f"expected max_rate in (0, 1], got {self.max_rate}")

    def described(self) -> dict[str, Any]:
        """The arguments as plain data, the same for all values that mean the same."""
        rates = self.allocation
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "rho": float(self.rho),
            "max_rate": float(self.max_rate),
            "ignore": sorted(self.ignore),
            "allocation": rates if isinstance(rates, str) else {name: float(rate) for name, rate in rates.items()},
        }

    def left_whole(self, model: nn.Module, groups: Sequence[Group]) -> dict[str, str]:
        """Names of the groups that may not lose neurons -> why.

        Raises:
            ValueError: a pattern of ``ignore`` or ``allocation`` that names no module.
        """
        whole = left_alone(model, groups, self.ignore)
        able = [g for g in groups if g.name not in whole]
        whole |= self.without_share(model, able)
        wide = [g for g in able if g.name not in whole]
        stuck = {g.name: self._narrow(g) for g in wide if len(removable(g, self.round_to, self.max_rate)) == 1}
        return whole | stuck

    def _narrow(self, group: Group) -> str:
        if len(removable(group, self.round_to)) == 1:
            return f"has no more than round_to={self.round_to} rows"
        return f"max_rate={self.max_rate} leaves it {group.size} neurons"

    def without_share(self, model: nn.Module, parts: Sequence[Part]) -> dict[str, str]:
        """Names of the parts that the allocation leaves whole -> why.

        Raises:
            ValueError: a pattern of ``allocation`` that names no module.
        """
        if not isinstance(self.allocation, Mapping):
            return {}
        shares = zip(parts, schedules.rates(self.allocation, model, parts), strict=True)
        return {p.name: "the allocation gives it no share" for p, rate in shares if not rate}

    def counts(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        trace: Trace,
        macs_of: Callable[[nn.Module], int],
        scores: Callable[[], list[Tensor]],
        whole: Mapping[str, str],
    ) -> list[int]:
        """How many neurons each group will lose, so that a share of the parameters or multiply-adds goes.

        Args:
            model: unpruned.
            groups: those that may lose neurons, in execution order.
            trace: of the model.
            macs_of: counts the multiply-adds of a network for one sample.
            scores: returns scores to rank the neurons of all groups by; called where the allocation is a ranking.
            whole: names of what is left whole -> why.

        Raises:
            ValueError: rho is out of reach.
        """
        cost = mac_cost(model, groups, trace, macs_of) if self.target == "macs" else parameter_cost(model, groups)
        choices = [removable(g, self.round_to, self.max_rate) for g in groups]
        return self.fitted(model, groups, cost, choices, scores, whole)

    def fitted(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        cost: Cost,
        choices: Sequence[Sequence[int]],
        scores: Callable[[], list[Tensor]],
        whole: Mapping[str, str],
    ) -> list[int]:
        """How many units each part will lose.

        Args:
            model: unpruned.
            parts: those that may lose units, in execution order.
            cost: of these parts.
            choices: for each part, how many units it may lose, ascending from 0.
            scores: returns scores to rank the units of all parts by; called where the allocation is a ranking.
            whole: names of what is left whole -> why.

        Raises:
            ValueError: rho is out of reach.
        """
        check_reach(cost, choices, self.rho, self._limits(model, whole))
        return fit(cost, choices, self.schedule(model, parts, cost, scores), self.rho)

    def _limits(self, model: nn.Module, whole: Mapping[str, str]) -> str:
        """What leaves most parameters of a model where they are, for a message."""
        rate = [f"max_rate={self.max_rate:g} of each"] if self.max_rate < 1 else []
        found = "; ".join(rate + _main_reasons(model, whole))
        return f"; most is kept by {found}" if found else ""

    def schedule(
        self, model: nn.Module, parts: Sequence[Part], cost: Cost, scores: Callable[[], list[Tensor]]
    ) -> schedules.Schedule:
        """Which parts lose more than others; the arguments are those of :meth:`fitted`."""
        if self.allocation in schedules.RANKINGS:
            return schedules.ranked(scores(), cost)
        rates = schedules.rates(self.allocation, model, parts)
        return schedules.proportional(rates, [p.size for p in parts])


def _main_reasons(model: nn.Module, whole: Mapping[str, str]) -> list[str]:
    """The three reasons that keep most parameters whole, each with the name of what holds most of these.

    Args:
        model: the network.
        whole: names of modules, or of parameters -> why they are left whole.
    """
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
    sizes |= {name: parameter.numel() for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = defaultdict(list)
    for name in sorted(whole, key=lambda name: -sizes.get(name, 0)):
        names[whole[name]].append(name)
    reasons = sorted(names, key=lambda reason: -sum(sizes.get(name, 0) for name in names[reason]))
    more = {reason: f" and {len(own) - 1} more" if own[1:] else "" for reason, own in names.items()}
    return [f"{names[reason][0]}{more[reason]} ({shorten(reason, 160)})" for reason in reasons[:3]]


def left_alone(model: nn.Module, groups: Sequence[Group], ignore: Collection[str]) -> dict[str, str]:
    """Names of the groups that may not lose neurons whatever the goal -> why.

    Raises:
        ValueError: a pattern of ``ignore`` that names no module.
    """
    whole = {g.name: g.frozen for g in groups if g.frozen is not None}
    whole |= {g.name: _single(g) for g in groups if g.size == 1 and g.frozen is None}
    return whole | ignored(model, groups, ignore)


def ignored(model: nn.Module, parts: Sequence[Part], ignore: Collection[str]) -> dict[str, str]:
    """Names of the parts that patterns name -> that they are ignored.

    Raises:
        ValueError: a pattern that names no module.
    """
    named = set[str]().union(*(named_parts(model, parts, pattern, "ignore") for pattern in ignore))
    return {p.name: "ignored" for p in parts if p.name in named}  # in the order of parts, whatever that of a set is


def _single(group: Group) -> str:
    rows = int((group.written(group.writers[0]).neuron == 0).sum())
    return "has only one neuron" if rows == 1 else f"its {rows} channels can only go together"
