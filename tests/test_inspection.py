import copy
import logging
import math
import threading

import pytest
import torch
from networks import MLP, DigitNet, ExciteNet, MobileNet, OptionANet, PlainNet, images, randomised
from states import global_settings, random_states, same, snapshot
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

import singe
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.removal.plan import Plan
from singe.removal.surgery import compact
from singe.sizes import count_macs, count_parameters

NETWORKS = {
    "residual": (lambda: DigitNet(4), lambda: images(6, channels=1)[0]),
    "depthwise": (MobileNet, lambda: images()[0]),
    "gates": (ExciteNet, lambda: images()[0]),
    "padded": (OptionANet, lambda: images()[0]),
    "sequences": (MLP, lambda: normal(4, 3, 10)),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    make, data = NETWORKS[request.param]
    model, x = randomised(make()), data()
    return model, x, singe.inspect(model, x)


def without(model, group, neurons):
    """A copy that has lost neurons of a group."""
    small, plan = copy.deepcopy(model), Plan()
    plan.add(group, neurons)
    compact(small, plan.removed())
    return small


def test_every_group_is_there_in_execution_order(case):
    model, x, inspection = case
    groups = find_groups(trace(model, x))
    assert [(g.name, g.units, g.members, g.frozen) for g in inspection.groups] == [
        (g.name, g.size, g.members, g.frozen) for g in groups
    ]
    assert inspection.prunable == tuple(g for g in inspection.groups if g.frozen is None) != ()
    assert inspection.frozen == {g.name: g.frozen for g in groups if g.frozen is not None} != {}
    for info in inspection.groups:
        assert all(name in dict(model.named_modules()) for name in (*info.members, *info.readers))
        assert bool(info.readers) == (info.frozen != "network output")


def test_costs_are_those_of_really_removing(case):
    model, x, inspection = case
    params, macs = count_parameters(model), count_macs(model, x)
    assert (inspection.params, inspection.macs) == (params, macs)
    for info, group in zip(inspection.groups, find_groups(trace(model, x)), strict=True):
        one, most = (without(model, group, neurons) for neurons in ([0], list(range(1, group.size))))
        assert info.params_per_unit == params - count_parameters(one)
        assert info.params_share == pytest.approx(1 - count_parameters(most) / params)
        if info.frozen is None:
            assert info.macs_per_unit == macs - count_macs(one, x)
            assert info.macs_share == pytest.approx(1 - count_macs(most, x) / macs)


def test_the_output_layer_costs_what_its_rows_do():
    inspection = singe.inspect(randomised(MLP()), normal(4, 10))
    head = inspection.groups[-1]
    assert (head.name, head.readers, head.frozen) == ("layers.4", (), "network output")
    assert (head.params_per_unit, head.macs_per_unit) == (9 + 1, 9)


def test_what_rho_can_reach_is_a_network_of_one_unit_everywhere(case):
    model, x, inspection = case
    plan = Plan()
    for group in find_groups(trace(model, x)):
        if group.frozen is None:
            plan.add(group, list(range(1, group.size)))
    small = plan.apply(copy.deepcopy(model))
    assert inspection.removable_params == pytest.approx(1 - count_parameters(small) / inspection.params)
    assert inspection.removable_macs == pytest.approx(1 - count_macs(small, x) / inspection.macs)


def test_rho_reaches_as_far_as_the_inspection_says():
    model, x = randomised(PlainNet()), images(8)
    reach = singe.inspect(model, x[0]).removable_params
    options = {"finetune": None, "progress": False, "images": 8, "criterion": "magnitude"}
    assert singe.prune(model, [x], math.floor(reach * 1e4) / 1e4, **options).params_removed > reach - 1e-3
    with pytest.raises(ValueError, match="rho <="):
        singe.prune(model, [x], math.ceil(reach * 1e4) / 1e4, **options)


class Mixed(nn.Module):
    """What prune leaves whole for every kind of reason."""

    def __init__(self):
        super().__init__()
        self.first, self.computed = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.free, self.single, self.guilty = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 1, 1), nn.Conv2d(1, 8, 1)
        self.hidden, self.head = nn.Linear(8, 7), nn.Linear(7, 4)

    def forward(self, x):
        y = F.relu(F.conv2d(F.relu(self.first(x)), self.computed.weight * 2))
        y = F.relu(self.guilty(F.relu(self.single(F.relu(self.free(y))))))
        return self.head(F.relu(self.hidden(y.view(y.shape[0], 8, -1).mean(2))))


def test_prune_and_inspect_leave_the_same_whole_for_the_same_reasons(caplog):
    model, batch = randomised(Mixed()), images(20)
    with caplog.at_level(logging.INFO, "singe"):
        inspection = singe.inspect(model, batch[0], ignore=["hid*"])
        assert not caplog.records
    options = {"finetune": None, "images": 20, "progress": False, "criterion": "magnitude", "ignore": ["hid*"]}
    assert inspection.frozen == singe.prune(model, [batch], 0.02, **options).frozen
    assert list(inspection.unfollowed) == ["computed"] and "is computed" in inspection.unfollowed["computed"]
    assert {g.name: g.frozen and g.frozen[:8] for g in inspection.groups} == {
        "first": "the weig", "free": None, "single": "has only", "guilty": "trial re", "hidden": "ignored",
        "head": "network ",
    }  # fmt: skip
    assert [g.name for g in inspection.prunable] == ["free"]
    assert inspection.removable_params == inspection.prunable[0].params_share


def test_layers_that_are_not_registered_are_told():
    model = Wired(lambda self, x: self.b(self.a(self.hidden[0](x)).relu()), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    model.hidden = [nn.Linear(4, 4)]
    inspection = singe.inspect(model, normal(3, 4))
    ((name, reason),) = inspection.unfollowed.items()
    assert (
        name == "(not registered)"
        and reason == "the weight of aten.linear.default is no parameter of the model; is its layer in a plain list?"
    )
    assert [g.name for g in inspection.prunable] == ["a"]


def test_a_network_without_anything_to_prune_is_inspected_all_the_same():
    inspection = singe.inspect(nn.Linear(10, 4), normal(3, 10))
    assert inspection.prunable == () and (inspection.removable_params, inspection.removable_macs) == (0, 0)
    assert "0 of 1 groups can be pruned: up to 0.0% of 44 parameters" in str(inspection)


@pytest.mark.parametrize(
    ("activation", "note"),
    [
        (nn.Sigmoid(), "fading ends at sigmoid(0), removal at nothing"),
        (nn.SiLU(), None),
    ],
    ids=["sigmoid", "silu"],
)
def test_an_activation_that_is_not_zero_at_zero_is_noted(activation, note):
    inspection = singe.inspect(randomised(MLP(activation)), normal(3, 10))
    assert [g.note for g in inspection.groups] == [note, None, None]
    assert ("removal at nothing" in str(inspection)) == (note is not None)


def test_a_sum_is_noted_as_one_and_what_is_frozen_is_not_noted():
    model = Wired(lambda self, x: self.b(self.a(x) + 1).sigmoid(), a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    notes = [g.note for g in singe.inspect(model, normal(3, 4)).groups]
    assert notes == ["fading ends at add(0), removal at nothing", None]


def test_the_table_has_a_line_for_every_group_and_module_and_one_for_the_whole():
    inspection = singe.inspect(randomised(Mixed()), images()[0])
    lines = str(inspection).splitlines()
    assert len(lines) == 2 + len(inspection.groups) + 1 + 1
    for info, line in zip(inspection.groups, lines[2:], strict=False):
        cells = line.split()
        assert cells[:2] == [info.name, str(info.units)] and f"{info.params_per_unit:,}" in cells
        assert f"{info.macs_share:.1%}" in cells and (not info.readers or info.readers[0] in cells)
        assert (info.frozen or "")[:40] in line
    assert lines[-2] == f"not followed: computed ({inspection.unfollowed['computed']})"
    assert f"{inspection.params:,} parameters" in lines[-1] and f"{inspection.removable_macs:.1%}" in lines[-1]


def test_long_names_are_cut_in_front_and_long_reasons_behind_to_fit_the_width():
    def wiring(self, x):
        y = self.get_submodule(path)(x)
        return self.head(y.view(-1, 7).relu())

    path = "encoder.layers.12.attention.output.projection.dense"
    model = Wired(wiring, encoder=nn.Module(), head=nn.Linear(7, 3))
    parent = model.encoder
    for name in path.split(".")[1:-1]:
        parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.dense = nn.Linear(4, 7)
    text = str(singe.inspect(model, normal(3, 4)))
    assert max(map(len, text.splitlines())) <= 140
    row = text.splitlines()[2]
    assert row.startswith("...") and row.split()[0].endswith("attention.output.projection.dense"[-29:])
    assert "trial removal failed: " in row and row.endswith("...")


def test_a_model_of_several_inputs_is_inspected_with_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x, z):
            return self.head((self.a(x) + self.b(z)).relu())

    example = {"x": normal(3, 4), "z": normal(3, 3)}
    inspection = singe.inspect(randomised(Two()), example, forward=lambda model, batch: model(**batch))
    assert [(g.name, g.members, g.readers) for g in inspection.prunable] == [("a", ("a", "b"), ("head",))]


def test_the_module_inside_of_a_wrapper_is_inspected():
    inspection = singe.inspect(nn.DataParallel(randomised(MLP())), normal(3, 10), ignore=["layers.0"])
    assert [g.name for g in inspection.groups] == ["layers.0", "layers.2", "layers.4"]


def test_the_model_the_example_and_all_settings_are_as_before():
    model, x = randomised(PlainNet()).train(), images()[0]
    model.features[1].eval()
    model.features[0].requires_grad_(False)
    F.cross_entropy(model(x), images()[1]).backward()
    before = snapshot(model), random_states(), global_settings(), x.clone()
    singe.inspect(model, x)
    assert same((snapshot(model), random_states(), global_settings(), x), before)


def locked():
    model = MLP()
    model.lock = threading.Lock()
    return model


class Branching(MLP):
    def forward(self, x):
        return self.layers(x) if x.sum() > 0 else x[:, :4]


X = normal(3, 10)


@pytest.mark.parametrize(
    ("arguments", "kind", "match"),
    [
        ({"model": "mlp"}, TypeError, "Module, got str"),
        ({"model": nn.ReLU()}, ValueError, "no parameters"),
        ({"model": locked()}, ValueError, r"copy\.deepcopy"),
        ({"model": randomised(Branching())}, ValueError, r"torch\.export.*Branching"),
        ({"example": None}, TypeError, "example to be a tensor x, got NoneType; other models need forward="),
        ({"example": (X, X)}, TypeError, r"got tuple; of a batch \(x, y\) pass x alone"),
        ({"example": X[:0]}, ValueError, r"at least 1, got .*\(0, 10\)"),
        ({"example": X * math.nan}, ValueError, "NaN"),
        ({"example": X[:, :9]}, ValueError, r"fit MLP.*\(3, 9\)"),
        ({"example": {"x": 3}, "forward": lambda m, b: m(b["x"])}, TypeError, "int at .*x"),
        ({"forward": "call"}, TypeError, "forward to be a function, got str"),
        ({"ignore": "layers"}, TypeError, "list of module names for ignore, got 'layers'"),
        ({"ignore": ["layer.0"]}, ValueError, r"ignore, got 'layer\.0'"),
    ],
)
def test_bad_input_is_refused(arguments, kind, match):
    with pytest.raises(kind, match=match):
        singe.inspect(**{"model": randomised(MLP()), "example": X, **arguments})


class Held(nn.Module):
    """Its copies still call the one that they were copied from."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 6), nn.Linear(6, 4)
        self.rest = torch.compile(self.behind, backend="eager")

    def behind(self, x):
        return self.second(x.relu())

    def forward(self, x):
        return self.rest(self.first(x))


def test_a_model_whose_copies_work_on_its_own_weights_is_refused_with_the_reason():
    model = randomised(Held())
    with pytest.raises(ValueError, match=r"copy of Held uses second\.weight of the model given"):
        singe.inspect(model, X)
    with pytest.raises(ValueError, match=r"second\.weight"):
        singe.prune(model, [(X, torch.arange(3))], 0.3, images=3, finetune=None, progress=False)
