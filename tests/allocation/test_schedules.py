import math

import numpy as np
import pytest
import torch
from chains import chain, group_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from singe.allocation.cost import parameter_cost
from singe.allocation.schedules import check, proportional, ranked, rates

chains = st.lists(st.integers(1, 40), min_size=3, max_size=7).map(chain)


# -- rates -------------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """Two convolutions, one of them in a container, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.conv2, self.down = nn.Conv2d(4, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1))


class ConvNorm(nn.Sequential):
    """A container with a name, as torchvision has them."""

    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


class Inverted(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"expand": ConvNorm(), "project": ConvNorm()})


class Stage(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.units = nn.ModuleList(Inverted() for _ in range(depth))
        self.last = nn.Conv2d(4, 4, 1)


class Once(nn.Module):
    """The only one of its class: no block."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)


class ResNetLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 7)
        self.layer1, self.layer2 = nn.Sequential(Unit(), Unit()), nn.ModuleList([Unit(), Unit()])
        self.top = Once()


def rated(allocation, model, *groups):
    return rates(allocation, model, [g if not isinstance(g, str) else group_of(g) for g in groups])


def test_uniform_rates_are_the_same_and_linear_ones_rise_to_one():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    assert rated("uniform", model, *"01234") == [1.0] * 5
    assert rated("linear", model, *"0123") == [0.25, 0.5, 0.75, 1.0]
    assert rated("linear", model, "2") == [1.0]


def test_block_rates_rise_from_one_repeated_module_to_the_next_whatever_contains_it():
    layers = ["stem", "layer1.0.conv1.0", "layer1.1.conv1.0", "layer1.1.conv2", "layer2.0.conv1.0"]
    found = rated("block", ResNetLike(), *layers, "layer2.1.conv1.0", "layer2.1.down.0")
    assert found == pytest.approx([1 / 5, 2 / 5, 3 / 5, 3 / 5, 4 / 5, 1, 1])


def test_a_stream_belongs_to_the_block_of_its_first_layer():
    stream1 = group_of("stem", "layer1.0.conv2", "layer1.1.conv2")
    stream2 = group_of("layer2.0.conv2", "layer2.0.down.0", "layer2.1.conv2")
    found = rated("block", ResNetLike(), stream1, "layer1.0.conv1.0", stream2, "layer2.1.conv1.0")
    assert found == [1 / 4, 2 / 4, 3 / 4, 1]


def test_of_repeated_modules_inside_each_other_the_innermost_is_the_block():
    model = nn.Sequential(Stage(2), Stage(1))
    names = ["0.units.0.parts.expand.0", "0.units.0.parts.project.0", "0.units.1.parts.expand.0", "0.last"]
    found = rated("block", model, *names, "1.units.0.parts.project.0")
    assert found == pytest.approx([1 / 4, 1 / 4, 2 / 4, 3 / 4, 1])


def test_outside_of_repeated_modules_every_layer_is_a_block_of_its_own():
    features = nn.Sequential(*[part for _ in range(3) for part in (nn.Conv2d(4, 4, 3), nn.ReLU())])
    vgg = nn.Sequential(features, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    layers = ["0.0", "0.2", "0.4", "1.0"]
    assert rated("block", vgg, *layers) == rated("linear", vgg, *layers) == [0.25, 0.5, 0.75, 1.0]
    assert rated("block", ResNetLike(), "stem", "top.fc1", "top.fc2") == rated("linear", vgg, *layers[:3])


STREAM = group_of("stem", "layer1.0.conv2", "layer1.1.conv2")
OTHERS = ["layer1.0.conv1.0", "layer1.1.conv1.0", "layer2.0.conv1.0", "layer2.0.conv2"]


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"stem": 0}, [0, 1, 1, 1, 1]),
        ({"layer1.1.conv2": 3}, [3, 1, 1, 1, 1]),  # any member names its group
        ({"layer1.0": 0.5}, [0.5, 0.5, 1, 1, 1]),  # a module stands for all inside it
        ({"layer2": 2}, [1, 1, 1, 2, 2]),
        ({"*.conv1": 0.25, "layer2.*": 4.0}, [1, 0.25, 0.25, 4, 4]),
        ({"layer2.*": 4.0, "*.conv1": 0.25}, [1, 0.25, 0.25, 0.25, 4]),  # the last entry wins
        ({"*": 0, "layer?.0.conv1": 1}, [0, 1, 0, 1, 0]),
        ({"*": np.float32(0.5)}, [0.5] * 5),
    ],
    ids=str,
)
def test_a_mapping_gives_rates_by_name_where_later_entries_override_earlier_ones(mapping, expected):
    assert rated(mapping, ResNetLike(), STREAM, *OTHERS) == expected


@pytest.mark.parametrize("pattern", ["conv1", "layer3", "layer1.0.conv"])
def test_a_rate_for_what_is_no_module_is_refused_by_name(pattern):
    with pytest.raises(ValueError, match=rf"allocation, got '{pattern}'"):
        rated({"stem": 1, pattern: 2}, ResNetLike(), STREAM, *OTHERS)


NAMES = ["uniform", "linear", "block", "global", "sensitivity"]


@pytest.mark.parametrize("allocation", [*NAMES, {}, {"a": 0, "b*": 2.5, "c": 7}])
def test_every_allocation_there_is_passes(allocation):
    check(allocation)


@pytest.mark.parametrize(
    ("allocation", "kind", "message"),
    [
        ("even", ValueError, "among uniform, linear, block, global, sensitivity, or a mapping, got 'even'"),
        ("", ValueError, "got ''"),
        (None, TypeError, "a name or a mapping, got NoneType"),
        (0.5, TypeError, "a name or a mapping, got float"),
        ([("a", 1)], TypeError, "a name or a mapping, got list"),
        ({"a": -0.1}, ValueError, "rates >= 0 in allocation, got -0.1 for 'a'"),
        ({"a": math.nan}, ValueError, "rates >= 0 in allocation, got nan for 'a'"),
        ({"b": 1, "a": math.inf}, ValueError, "rates >= 0 in allocation, got inf for 'a'"),
        ({"a": True}, TypeError, r"a number for allocation\['a'\], got bool"),
        ({"a": "1"}, TypeError, r"a number for allocation\['a'\], got str"),
        ({"a": None}, TypeError, r"a number for allocation\['a'\], got NoneType"),
        ({0: 1.0}, TypeError, "module names as keys of allocation, got 0"),
        ({("a", "b"): 1.0}, TypeError, r"module names as keys of allocation, got \('a', 'b'\)"),
    ],
    ids=str,
)
def test_what_is_no_allocation_is_refused(allocation, kind, message):
    with pytest.raises(kind, match=message):
        check(allocation)


# -- schedules ---------------------------------------------------------------------------------------------------

levels = st.floats(0, 1)
rated_groups = st.lists(st.tuples(st.sampled_from([0, 1e-3, 0.25, 1, 3.5, 40]), st.integers(1, 300)), min_size=1)


@given(rated_groups, levels, levels)
def test_a_proportional_schedule_rises_and_ends_where_all_that_has_a_rate_is_gone(groups, one, other):
    rate, sizes = zip(*groups, strict=True)
    schedule = proportional(rate, sizes)
    low, high = schedule(min(one, other)), schedule(max(one, other))
    assert all(0 <= a <= b <= n for a, b, n in zip(low, high, sizes, strict=True))
    assert schedule(0.0) == [0] * len(groups)
    assert schedule(1.0) == pytest.approx([n if r else 0 for r, n in groups])


@given(rated_groups, levels)
def test_groups_lose_in_proportion_to_their_rates_until_they_have_none_left(groups, level):
    rate, sizes = zip(*groups, strict=True)
    shares = [lost / n for lost, n in zip(proportional(rate, sizes)(level), sizes, strict=True)]
    pairs = [(s, r) for s, r in zip(shares, rate, strict=True) if r]
    unsaturated = [s / r for s, r in pairs if s < 1]
    assert unsaturated == pytest.approx([unsaturated[0]] * len(unsaturated) if unsaturated else [])
    assert all(s / r <= u * (1 + 1e-9) for s, r in pairs if s == 1 for u in unsaturated)


def by_hand(scores, units, count):
    """How many of the ``count`` neurons that are worth least for what they cost each group has."""
    every = sorted((s / unit, i, j) for i, (own, unit) in enumerate(zip(scores, units, strict=True))
                   for j, s in enumerate(own))  # fmt: skip
    return [sum(i == group for _, i, _ in every[:count]) for group in range(len(scores))]


@given(chains, st.data())
def test_the_global_ranking_is_by_score_for_what_a_neuron_saves_negative_scores_first(case, data):
    model, groups = case
    cost, values = parameter_cost(model, groups), st.floats(-2, 5, width=16)
    scores = [data.draw(st.lists(values, min_size=g.size, max_size=g.size)) for g in groups]
    units = [cost.unit([0] * len(groups), i) for i in range(len(groups))]
    schedule = ranked([torch.tensor(s, dtype=torch.float64) for s in scores], cost)
    total = sum(g.size for g in groups)
    counts = [schedule(k / total) for k in range(total + 1)]
    assert counts == [by_hand(scores, units, k) for k in range(total + 1)]
    assert counts[-1] == [g.size for g in groups]


def test_a_neuron_that_saves_more_goes_before_one_of_the_same_score():
    model, groups = chain([50, 3, 2, 10])  # a neuron of the first layer saves 53, one of the second 14
    scores = [torch.tensor([5.0, 6.0, 70.0], dtype=torch.float64), torch.tensor([4.0, 0.5], dtype=torch.float64)]
    schedule = ranked(scores, parameter_cost(model, groups))
    order = [schedule(k / 5) for k in range(6)]  # 0.5 / 14, 5 / 53, 6 / 53, 4 / 14, 70 / 53
    assert order == [[0, 0], [0, 1], [1, 1], [2, 1], [2, 2], [3, 2]]
