import itertools
import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from singe.allocation import fit, proportional
from singe.cost import parameter_cost
from singe.graph.groups import Group, Slice
from singe.plan import Plan
from singe.result import count_parameters


def chain(widths):
    """Linear layers of these widths, and the group of each but the last."""
    model = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])
    groups = []
    for i, width in enumerate(widths[1:-1]):
        own = torch.arange(width)
        slices = (Slice(f"{i}.weight", 0, own), Slice(f"{i}.bias", 0, own), Slice(f"{i + 1}.weight", 1, own))
        groups.append(Group(str(i), width, (f"{i}.weight",), slices, None))
    return model, groups


def really_gone(model, groups, removed):
    before, plan = count_parameters(model), Plan()
    for group, n in zip(groups, removed, strict=True):
        plan.add(group, list(range(n)))
    return before - count_parameters(plan.apply(model))


def uniform(cost, sizes, rho):
    return fit(cost, [range(n) for n in sizes], proportional([1.0] * len(sizes), sizes), rho)


chains = st.lists(st.integers(1, 40), min_size=3, max_size=7).map(chain)


@settings(max_examples=60, deadline=None)
@given(chains, st.data())
def test_the_count_is_what_compaction_takes(case, data):
    model, groups = case
    count = parameter_cost(model, groups)
    assert count.total == count_parameters(model)
    removed = [data.draw(st.integers(0, g.size - 1)) for g in groups]
    gone = count.gone(removed)
    for i, group in enumerate(groups):
        more = [n + (j == i) for j, n in enumerate(removed)]
        if more[i] < group.size:
            assert count.unit(removed, i) == count.gone(more) - gone > 0
    assert gone == really_gone(model, groups, removed)


def test_parameters_behind_a_flattening_and_fixed_ones_count_exactly():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), nn.Linear(5, 2))
    own = torch.arange(4)
    slices = [Slice(n, 0, own) for n in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")]
    group = Group("0", 4, ("0.weight",), (*slices, Slice("3.weight", 1, own.repeat_interleave(4))), None)
    count = parameter_cost(model, [group])
    assert count.gone([3]) == 3 * (27 + 1 + 2 + 4 * 5)
    assert count.gone([3]) == really_gone(model, [group], [3])


def test_tied_parameters_count_once():
    model, _ = chain([6, 6, 6, 2])
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model.again = model[2]
    own = torch.arange(6)
    names = [("1.weight", 0), ("0.weight", 1), ("1.bias", 0), ("again.weight", 1)]
    group = Group("0", 6, ("1.weight",), tuple(Slice(n, d, own) for n, d in names), None)
    count = parameter_cost(model, [group])
    assert count.total == 6 * 6 + 6 + 6 * 2 + 2
    assert count.gone([2]) == 36 - 16 + 2 + 4
    assert count.gone([2]) == really_gone(model, [group], [2])


@settings(max_examples=200, deadline=None)
@given(chains, st.floats(0.001, 0.999))
def test_uniform_is_within_one_smallest_neuron_of_rho(case, rho):
    model, groups = case
    count, sizes = parameter_cost(model, groups), [g.size for g in groups]
    target = rho * count.total
    assume(target <= count.gone([n - 1 for n in sizes]))
    removed = uniform(count, sizes, rho)
    assert all(0 <= r < n for r, n in zip(removed, sizes, strict=True))
    gap = abs(target - count.gone(removed))
    for i, n in enumerate(sizes):
        for step in (-1, 1):
            other = [r + step * (i == j) for j, r in enumerate(removed)]
            assert not 0 <= other[i] < n or abs(target - count.gone(other)) >= gap


@pytest.mark.parametrize(
    ("widths", "rho"),
    [
        ([50, 200, 100, 40, 10], 0.5),
        ([784, 300, 100, 10], 0.5),
        ([3, 16, 16, 16, 16, 64, 64, 10], 0.3),
        ([1000, 10, 10, 10, 2], 0.5),
    ],
)
def test_uniform_takes_about_the_same_share_everywhere(widths, rho):
    model, groups = chain(widths)
    sizes = [g.size for g in groups]
    removed = uniform(parameter_cost(model, groups), sizes, rho)
    slack = {n: max(1.5, 0.05 * n) for n in sizes}
    highest = min((r + slack[n]) / n for r, n in zip(removed, sizes, strict=True))
    lowest = max((r - slack[n]) / n for r, n in zip(removed, sizes, strict=True))
    assert lowest <= highest, f"no common rate for {removed} of {sizes}"


def test_the_same_input_gives_the_same_widths():
    model, groups = chain([5, 8, 8, 8, 3])
    count = parameter_cost(model, groups)
    assert uniform(count, [8, 8, 8], 0.4) == uniform(count, [8, 8, 8], 0.4)


@pytest.mark.parametrize("widths", [[3, 4, 5, 2], [30, 7, 40], [9, 6, 6, 90], [11, 3, 13]])
def test_rho_out_of_reach_is_refused_and_the_limit_named_is_within_reach(widths):
    model, groups = chain(widths)
    count, sizes = parameter_cost(model, groups), [g.size for g in groups]
    with pytest.raises(ValueError, match=r"expected rho <= .* got 0.99") as refused:
        uniform(count, sizes, 0.99)
    limit = float(re.search(r"<= ([\d.]+)", str(refused.value))[1])
    assert limit == pytest.approx(count.gone([n - 1 for n in sizes]) / count.total, abs=2e-4)
    removed = uniform(count, sizes, limit)
    assert sum(removed) >= sum(sizes) - len(sizes) - 1
