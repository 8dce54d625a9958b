import math
import re
from types import SimpleNamespace

import pytest
import torch
from chains import chain, group_of
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from singe.allocation.cost import parameter_cost
from singe.allocation.fit import fit, removable
from singe.allocation.schedules import proportional, ranked


def uniform(cost, sizes, rho):
    return fit(cost, [range(n) for n in sizes], proportional([1.0] * len(sizes), sizes), rho)


chains = st.lists(st.integers(1, 40), min_size=3, max_size=7).map(chain)


# -- choices -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 20))
def test_what_a_group_may_lose_leaves_a_multiple_of_rows_or_all(size, rows, round_to):
    kept = [k for k in range(size, 0, -1) if k == size or k * rows % round_to == 0]
    assert removable(group_of("a", size=size, rows=rows), round_to) == [size - k for k in kept]


@pytest.mark.parametrize(
    ("size", "round_to", "max_rate", "left"),
    [
        (10, 1, 0.9, range(10, 0, -1)),
        (10, 1, 0.3, (10, 9, 8, 7)),
        (10, 1, 0.05, (10,)),
        (10, 4, 0.5, (10, 8)),
        (10, 1, 1, range(10, 0, -1)),
        (3, 1, 1 / 3, (3, 2)),
    ],
)
def test_a_group_loses_no_larger_share_than_it_may(size, round_to, max_rate, left):
    assert removable(group_of("a", size=size), round_to, max_rate) == [size - kept for kept in left]


@pytest.mark.parametrize(
    ("size", "rows", "round_to", "widths"),
    [
        (12, 1, 1, range(12, 0, -1)),
        (24, 1, 8, [24, 16, 8]),
        (20, 1, 8, [20, 16, 8]),
        (8, 1, 8, [8]),
        (7, 1, 8, [7]),
        (9, 4, 8, [9, 8, 6, 4, 2]),  # 32, 24, 16 and 8 rows
        (9, 3, 8, [9, 8]),
        (5, 8, 8, [5, 4, 3, 2, 1]),
    ],
)
def test_the_widths_left_by_hand(size, rows, round_to, widths):
    assert [size - n for n in removable(group_of("a", size=size, rows=rows), round_to)] == list(widths)


# -- rho to widths -----------------------------------------------------------------------------------------------


def assert_close_to(target, cost, choices, removed):
    """Within the smallest move of a single group, or at least no such move comes closer."""
    gap, moves = target - cost.gone(removed), []
    for i, own in enumerate(choices):
        at = own.index(removed[i])
        for other in (*own[max(0, at - 1) : at], *own[at + 1 : at + 2]):
            moves.append(cost.gone([*removed[:i], other, *removed[i + 1 :]]) - cost.gone(removed))
    assert abs(gap) < min(map(abs, moves)) or all(abs(gap - move) >= abs(gap) for move in moves)


@settings(max_examples=200)
@given(chains, st.floats(0.001, 0.999))
def test_uniform_is_within_one_smallest_neuron_of_rho(case, rho):
    model, groups = case
    count, sizes = parameter_cost(model, groups), [g.size for g in groups]
    target = rho * count.total
    assume(target <= count.gone([n - 1 for n in sizes]))
    removed = uniform(count, sizes, rho)
    assert all(0 <= r < n for r, n in zip(removed, sizes, strict=True))
    assert_close_to(target, count, [range(n) for n in sizes], removed)


@settings(max_examples=150)
@given(chains, st.integers(1, 9), st.floats(0.001, 0.999), st.data())
def test_widths_are_multiples_and_within_the_smallest_move_of_rho(case, round_to, share, data):
    model, groups = case
    cost, sizes = parameter_cost(model, groups), [g.size for g in groups]
    choices = [removable(g, round_to) for g in groups]
    rho = share * cost.gone([c[-1] for c in choices]) / cost.total
    assume(rho > 0)
    if data.draw(st.booleans(), "ranked"):
        schedule = ranked([torch.tensor(data.draw(st.permutations(range(n)))).double() for n in sizes], cost)
    else:
        schedule = proportional(data.draw(st.lists(st.floats(0, 9), min_size=len(sizes), max_size=len(sizes))), sizes)
    removed = fit(cost, choices, schedule, rho)
    assert all((n - r) % round_to == 0 or r == 0 for n, r in zip(sizes, removed, strict=True))
    assert_close_to(rho * cost.total, cost, choices, removed)


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


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(20, 60), st.sampled_from([0, 0.5, 1, 2])), min_size=2, max_size=6),
       st.floats(0.02, 0.6))  # fmt: skip
def test_shares_follow_the_rates_but_for_a_neuron_or_two(groups, rho):
    sizes, rate = zip(*groups, strict=True)
    assume(any(rate))
    model, found = chain([30, *sizes, 10])
    cost = parameter_cost(model, found)
    assume(rho * cost.total < 0.9 * cost.gone([(n - 1) * bool(r) for n, r in zip(sizes, rate, strict=True)]))
    choices = [range(n if r else 1) for n, r in zip(sizes, rate, strict=True)]
    removed = fit(cost, choices, proportional(rate, sizes), rho)
    per_rate = [(n, r, lost) for n, r, lost in zip(sizes, rate, removed, strict=True) if r]
    bounds = [((lost - 2) / (n * r), (lost + 2) / (n * r) if lost + 2 < n else math.inf) for n, r, lost in per_rate]
    assert max(low for low, _ in bounds) <= min(high for _, high in bounds), f"no common level for {removed}"


@pytest.mark.parametrize(
    ("widths", "rho", "removed"),
    [
        ([16, 16, 24, 32, 32, 16], 0.696, [8, 16, 16, 16]),
        ([8, 32, 64, 16], 0.355, [8, 16]),
        ([64, 48, 32, 48], 0.723, [32, 24]),
    ],
)
def test_rounded_widths_stay_near_a_common_share(widths, rho, removed):
    model, groups = chain(widths)
    choices, schedule = [removable(g, 8) for g in groups], proportional([1.0] * len(groups), widths[1:-1])
    assert fit(parameter_cost(model, groups), choices, schedule, rho) == removed


def test_the_same_input_gives_the_same_widths():
    model, groups = chain([5, 8, 8, 8, 3])
    count = parameter_cost(model, groups)
    assert uniform(count, [8, 8, 8], 0.4) == uniform(count, [8, 8, 8], 0.4)


def refused(cost, choices, rho=0.99):
    """The limit that the refusal of ``rho`` names."""
    schedule = proportional([1.0] * len(choices), [c[-1] + 1 for c in choices])
    with pytest.raises(ValueError, match=rf"expected rho <= .* got {rho}") as caught:
        fit(cost, choices, schedule, rho)
    return float(re.search(r"<= ([\d.e-]+),", str(caught.value))[1]), schedule


@pytest.mark.parametrize("round_to", [1, 2, 4])
@pytest.mark.parametrize("widths", [[3, 9, 5, 2], [30, 7, 40], [9, 6, 6, 90], [11, 6, 13]])
def test_rho_out_of_reach_is_refused_and_the_limit_named_is_within_reach(widths, round_to):
    model, groups = chain(widths)
    cost, choices = parameter_cost(model, groups), [removable(g, round_to) for g in groups]
    limit, schedule = refused(cost, choices)
    assert limit == pytest.approx(cost.gone([c[-1] for c in choices]) / cost.total, abs=2e-4)
    removed = fit(cost, choices, schedule, limit)
    assert sum(own.index(own[-1]) - own.index(lost) for own, lost in zip(choices, removed, strict=True)) <= 1
    assert refused(cost, choices, limit + 2e-4)[0] == limit


def test_a_limit_that_is_next_to_nothing_is_not_called_zero():
    model, groups = chain([1, 2, 1, 300, 300, 1])
    limit, schedule = refused(parameter_cost(model, groups[:1]), [[0, 1]], 0.5)
    assert 0 < limit < 1e-4
    assert fit(parameter_cost(model, groups[:1]), [[0, 1]], schedule, limit) == [1]


@given(st.integers(2, 10**7), st.integers(1, 10**7))
@example(100, 7)  # 0.07 * 100 > 7
def test_the_limit_named_is_taken_whatever_it_is(total, reach):
    assume(reach < 0.999 * total)
    gone, unit = (lambda counts: reach * counts[0]), (lambda counts, group: reach)
    cost = SimpleNamespace(total=total, grain=1, gone=gone, unit=unit)
    limit, schedule = refused(cost, [[0, 1]], 0.9999999)
    assert 0.999 * reach / total <= limit <= reach / total
    assert fit(cost, [[0, 1]], schedule, limit) == [1]
