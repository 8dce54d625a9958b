import pytest
import torch
from chains import chain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from singe.allocation.cost import parameter_cost
from singe.allocation.latency_cost import LatencyCost, LatencyTable
from singe.graph.groups import Group, Slice


def parameters_left(widths, removed):
    """{layer: its parameters} of a chain when its groups have lost so many neurons."""
    left = [w - r for w, r in zip(widths, [0, *removed, 0], strict=True)]
    return {str(i): float(left[i + 1] * (left[i] + 1)) for i in range(len(widths) - 1)}


def table_of(widths, networks):
    model, groups = chain(widths)
    return LatencyTable(model, groups, networks, [parameters_left(widths, removed) for removed in networks])


@settings(max_examples=40)
@given(st.data(), st.lists(st.integers(2, 20), min_size=3, max_size=5))
def test_where_time_is_in_proportion_to_parameters_the_table_counts_them(data, widths):
    """Networks that lose the same share everywhere say all about those that do not."""
    sizes = widths[1:-1]
    networks = [[int(level * n) for n in sizes] for level in (0, 0.25, 0.5, 0.75)] + [[n - 1 for n in sizes]]
    table, (model, groups) = table_of(widths, networks), chain(widths)
    removed = [data.draw(st.integers(0, n - 1)) for n in sizes]
    least = min(parameters_left(widths, networks[-1])[layer] for layer in parameters_left(widths, removed))
    assert table.saved(removed) == pytest.approx(parameter_cost(model, groups).gone(removed), rel=1e-6) or any(
        parameters_left(widths, removed)[layer] < least for layer in parameters_left(widths, removed)
    )
    assert table.saved([0] * len(sizes)) == 0


def test_modules_without_parameters_count_with_the_one_around_them_and_whole_ones_not_at_all():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), nn.Linear(4, 1), nn.Linear(1, 1))
    own = torch.arange(4)
    slices = (Slice("0.0.weight", 0, own, "writes"), Slice("0.0.bias", 0, own, "writes"))
    group = Group("0.0", 4, ("0.0.weight",), (*slices, Slice("1.weight", 1, own, "reads")), None)
    whole = {"": 1.0, "0": 2.0, "0.0": 40.0, "0.1": 8.0, "1": 16.0, "2": 100.0, "0.0.unknown": 4.0}
    half = {"": 1.0, "0": 1.0, "0.0": 20.0, "0.1": 4.0, "1": 10.0, "2": 70.0, "0.0.unknown": 2.0}
    table = LatencyTable(model, [group], [[0], [2]], [whole, half])
    assert table.saved([2]) == pytest.approx(1 + 20 + 4 + 6 + 2)  # "2" only was faster by chance
    assert table.saved([1]) == pytest.approx(33 / 2)


def test_what_gets_slower_as_it_gets_smaller_saves_nothing():
    model, groups = chain([4, 8, 2])
    seconds = [{"0": 5.0, "1": 3.0}, {"0": 7.0, "1": 2.0}, {"0": 4.0, "1": 2.5}]
    table = LatencyTable(model, groups, [[0], [4], [7]], seconds)
    saved = [table.saved([n]) for n in range(8)]
    assert saved == sorted(saved) and saved[0] == 0
    assert saved[4] == pytest.approx(0.75)  # layer 0 as the mean of 5 and 7 until there, 1 as that of 2 and 2.5
    assert saved[7] == pytest.approx(6 - 4 + 0.75)


def test_the_cost_is_what_was_learned_from_whole_networks():
    widths, most = [4, 8, 8, 4], [7, 7]
    table = table_of(widths, [[0, 0], [2, 2], [4, 4], [6, 6], most])
    cost = LatencyCost(table, 2e-3, most)
    assert cost.total == 2_000_000 and 0 < cost.grain <= cost.total / 100
    cost.learn(most, 0.8)
    cost.learn([4, 4], 0.5)
    assert cost.gone([0, 0]) == 0 and cost.gone([4, 4]) == 1_000_000 and cost.gone(most) == 1_600_000
    assert 1_000_000 < cost.gone([5, 5]) < 1_600_000
    cost.learn([4, 4], 0.6)
    assert cost.gone([4, 4]) == 1_100_000
    cost.learn([1, 1], -0.3)  # slower, by chance: nothing is gone
    assert cost.gone([1, 1]) == 0 and cost.gone([4, 4]) == 1_100_000


def test_a_unit_costs_what_one_of_its_group_saves_on_average():
    widths, most = [10, 8, 4, 2], [7, 3]
    table = table_of(widths, [[0, 0], [2, 1], [4, 2], most])
    cost = LatencyCost(table, 1.0, most)
    for part, alone in enumerate(([7, 0], [0, 3])):
        assert cost.unit([0, 0], part) == cost.unit([1, 1], part) == round(1e9 * table.saved(alone) / most[part]) > 0
