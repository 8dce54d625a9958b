import copy
import itertools
from functools import cache, partial

import pytest
import torch
from chains import chain
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import MLP, DigitNet, ExciteNet, FlattenNet, MobileNet, PlainNet, ResNeXt, images, randomised
from torch import nn
from wiring import Attention, Wired, normal

from singe.allocation.cost import mac_cost, parameter_cost
from singe.graph.analysis import find_groups
from singe.graph.groups import Group, Slice
from singe.graph.trace import trace
from singe.removal.plan import Plan
from singe.sizes import count_macs, count_parameters


def cut(model, groups, removed):
    """A copy without some neurons (indices) of each group."""
    plan = Plan()
    for group, neurons in zip(groups, removed, strict=True):
        plan.add(group, sorted(neurons))
    return plan.apply(copy.deepcopy(model))


def really_gone(model, groups, removed):
    return count_parameters(model) - count_parameters(cut(model, groups, [range(n) for n in removed]))


# -- by hand -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=3, max_size=7).map(chain), st.data())
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
    slices = [
        Slice(n, 0, own, "writes")
        for n in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")
    ]
    group = Group("0", 4, ("0.weight",), (*slices, Slice("3.weight", 1, own.repeat_interleave(4), "reads")), None)
    count = parameter_cost(model, [group])
    assert count.gone([3]) == 3 * (27 + 1 + 2 + 4 * 5)
    assert count.gone([3]) == really_gone(model, [group], [3])


def test_tied_parameters_count_once():
    model, _ = chain([6, 6, 6, 2])
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    model.again = model[2]
    own = torch.arange(6)
    names = [("1.weight", 0), ("0.weight", 1), ("1.bias", 0), ("again.weight", 1)]
    group = Group("0", 6, ("1.weight",), tuple(Slice(n, d, own, ("writes", "reads")[d]) for n, d in names), None)
    count = parameter_cost(model, [group])
    assert count.total == 6 * 6 + 6 + 6 * 2 + 2
    assert count.gone([2]) == 36 - 16 + 2 + 4
    assert count.gone([2]) == really_gone(model, [group], [2])


# -- on networks -------------------------------------------------------------------------------------------------


def tied():
    """Two linear layers with one weight read one stream; a third, tied too, is never called."""

    def wiring(self, x):
        y = self.stem(x).relu()
        return self.head(self.a(y).relu() + self.b(2 * y).sigmoid())

    linear = nn.Linear
    model = Wired(wiring, stem=linear(10, 6), a=linear(6, 5), b=linear(6, 5), head=linear(5, 4), spare=linear(10, 6))
    model.b.weight, model.spare.weight = model.a.weight, model.stem.weight
    return model


def beside():
    """Attention without weights beside two linear layers on sequences."""

    def wiring(self, x):
        return self.b(self.a(x).relu()).mean(1) + (x @ x.transpose(1, 2)).softmax(2).sum((1, 2))[:, None]

    return Wired(wiring, a=nn.Linear(10, 7), b=nn.Linear(7, 4))


def ranks():
    """Convolutions in one and three dimensions."""

    def wiring(self, x):
        line, space = self.one(x.flatten(2)).relu(), self.three(x.unflatten(1, (1, 3))).relu()
        return self.head(line.mean(2) + self.second(space).relu().mean((2, 3, 4)))

    one = nn.Conv1d(3, 5, 4, stride=3, padding=2)
    three, second = nn.Conv3d(1, 6, (2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 2, 1)), nn.Conv3d(6, 5, 1, bias=False)
    return Wired(wiring, one=one, three=three, second=second, head=nn.Linear(5, 4))


NETWORKS = {
    "pooled": (PlainNet, lambda: images(4)[0]),
    "strides, dilation and flattening": (FlattenNet, lambda: images(4)[0]),
    "residual": (lambda: DigitNet(3), lambda: images(4, channels=1)[0]),
    "depthwise": (MobileNet, lambda: images(4)[0]),
    "grouped": (ResNeXt, lambda: images(4)[0]),
    "gates": (ExciteNet, lambda: images(4)[0]),
    "vectors": (MLP, lambda: normal(4, 10)),
    "sequences": (MLP, lambda: normal(4, 3, 10)),
    "other ranks": (ranks, lambda: images(4)[0]),
    "tied": (tied, lambda: normal(4, 10)),
    "attention": (beside, lambda: normal(4, 3, 10)),
}


@cache
def traced(name):
    make, data = NETWORKS[name]
    model, x = randomised(make()), data()
    graph = trace(model, x)
    return model, x, graph, [g for g in find_groups(graph) if g.frozen is None and g.size > 1]


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=8)
@given(st.data())
def test_what_is_saved_is_what_a_smaller_network_no_longer_costs(name, data):
    model, x, graph, groups = traced(name)
    assert groups
    macs, parameters = mac_cost(model, groups, graph, partial(count_macs, inputs=x)), parameter_cost(model, groups)
    assert (macs.total, parameters.total) == (count_macs(model, x), count_parameters(model))
    removed = [data.draw(st.sets(st.integers(0, g.size - 1), max_size=g.size - 1), g.name) for g in groups]
    counts, small = [len(neurons) for neurons in removed], cut(model, groups, removed)
    assert macs.gone(counts) == macs.total - count_macs(small, x)
    assert parameters.gone(counts) == parameters.total - count_parameters(small)


def test_a_weight_costs_one_multiply_add_at_every_position_where_it_is_used():
    model, x, graph, groups = traced("pooled")
    assert [g.name for g in groups] == ["features.0", "features.4", "features.7", "classifier.0"]
    cost = mac_cost(model, groups, graph, partial(count_macs, inputs=x))
    assert cost.total == 7 * 27 * 64 + 9 * 7 * 9 * 16 + 6 * 9 * 9 * 4 + 6 * 11 + 11 * 4
    assert cost.gone([1, 0, 0, 0]) == 27 * 64 + 9 * 9 * 16
    assert cost.gone([0, 0, 0, 5]) == 5 * (6 + 4)
    assert cost.gone([2, 3, 0, 0]) == 2 * 27 * 64 + (7 * 9 - 5 * 6) * 9 * 16 + 3 * 6 * 9 * 4
    assert cost.unit([2, 3, 0, 0], 1) == 5 * 9 * 16 + 6 * 9 * 4


def test_what_torch_counts_beside_convolutions_and_linear_layers_stays():
    model, x, graph, groups = traced("attention")
    cost = mac_cost(model, groups, graph, partial(count_macs, inputs=x))
    layers, attention = 3 * (10 * 7 + 7 * 4), 3 * 3 * 10
    assert cost.total == layers + attention
    assert cost.gone([6]) == 6 * layers // 7


def test_a_layer_that_is_never_called_costs_parameters_but_no_multiply_adds():
    model, x, graph, groups = traced("tied")
    assert [g.name for g in groups] == ["stem", "a"]
    assert mac_cost(model, groups, graph, partial(count_macs, inputs=x)).gone([2, 0]) == 2 * (10 + 5 + 5)
    assert parameter_cost(model, groups).gone([2, 0]) == 2 * (10 + 1 + 5)
    assert mac_cost(model, groups, graph, partial(count_macs, inputs=x)).unit([0, 0], 1) == 6 + 6 + 4
    assert parameter_cost(model, groups).unit([0, 0], 1) == 6 + 1 + 1 + 4


@pytest.mark.parametrize("fused", [True, False])
def test_products_of_activations_cost_what_a_flop_counter_says(fused):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(True, fused), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    x = torch.randn(2, 40, 5)
    graph = trace(model, x)
    groups = [g for g in find_groups(graph) if g.frozen is None]
    cost = mac_cost(model, groups, graph, partial(count_macs, inputs=x))
    assert [g.size for g in groups] == [3, 5, 6] and cost.total == count_macs(model, x) > 2 * 40 * 40 * 12
    for removed in itertools.product(range(3), (0, 2), (0, 1, 5)):
        narrower = cut(model, groups, [range(n) for n in removed])
        assert cost.gone(removed) == cost.total - count_macs(narrower, x), removed


@pytest.mark.parametrize("name", ["pooled", "sequences"])
def test_the_cost_is_that_of_one_sample_however_many_the_example_has(name):
    model, x, graph, groups = traced(name)
    totals = [count_macs(model, torch.cat([x] * n)) for n in (1, 3)]
    assert totals[0] == totals[1] == count_macs(model, x)
    one = mac_cost(model, groups, trace(model, x[:1]), partial(count_macs, inputs=x))
    four = mac_cost(model, groups, graph, partial(count_macs, inputs=x))
    assert one.gone([1] * len(groups)) == four.gone([1] * len(groups))
