import pytest
import torch
from networks import images
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from wiring import Wired, free, frozen, groups_of, normal, once, owned

from singe.trial import unsafe_groups


def gate(self, x):
    y = self.a(x)
    s = torch.sigmoid(self.up(self.down(y.mean((2, 3), keepdim=True)).relu()))
    return self.head((y * s).relu().mean((2, 3)))


def test_a_channel_gate_is_coupled_with_what_it_gates():
    model = Wired(gate, a=nn.Conv2d(3, 6, 3), down=nn.Conv2d(6, 4, 1), up=nn.Conv2d(4, 6, 1), head=nn.Linear(6, 2))
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 6, "down": 4}
    assert groups["a"].writers == ("a.weight", "up.weight")
    assert owned(groups["a"]) == once("a.weight", "a.bias", "up.weight", "up.bias", "down.weight@1", "head.weight@1")


def spatial_gate(self, x):
    y = self.a(x).relu()
    return self.head((y * torch.sigmoid(self.g(self.b(y).relu()))).mean((2, 3)))


def test_a_spatial_gate_is_frozen_and_what_it_gates_is_not():
    model = Wired(spatial_gate, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 4, 1), g=nn.Conv2d(4, 1, 1), head=nn.Linear(6, 2))
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 6, "b": 4}
    assert frozen(groups)["g"] == "broadcast over other neurons by aten.mul.Tensor"


def test_an_explicit_expand_is_a_broadcast_too():
    def wiring(self, x):
        y = self.a(x)
        return self.head((y + self.g(x).expand(-1, y.shape[1], -1, -1)).relu().mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), g=nn.Conv2d(3, 1, 1), head=nn.Linear(6, 2))
    groups = groups_of(model, images()[0])
    assert frozen(groups)["g"].startswith("broadcast over other neurons by aten.add")


PADS = {
    "F.pad": lambda y: F.pad(y, (0, 0, 0, 0, 0, 4)),
    "zeros": lambda y: torch.cat([y, torch.zeros(y.shape[0], 4, *y.shape[2:])], 1),
}


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS.keys())
def test_padded_channels_belong_to_nobody(pad):
    def wiring(self, x):
        y = self.a(x).relu()
        return self.head((pad(y) + self.b(y)).relu().mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 10, 1), head=nn.Linear(10, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert owned(groups["a"]) == once("a.weight", "a.bias", "b.weight", "b.bias", "b.weight@1", "head.weight@1")
    assert groups["a"].frozen is None and groups["a"].size == 6
    assert groups["a"].rows("b.weight").flatten().tolist() == list(range(6))
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_padding_of_positions_changes_nobody():
    model = Wired(lambda self, x: self.head(F.pad(self.a(x).relu(), (1, 1)).sum((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.head = nn.Linear(6, 2)
    assert free(groups_of(model, images()[0])) == {"a": 6}


MOVES = {
    "permute": (lambda self, y: self.lin(y.permute(0, 2, 3, 1)).mean((1, 2)), 8, 1),
    "tokens": (lambda self, y: self.lin(y.flatten(2).transpose(1, 2)).mean(1), 8, 1),
    "pixel shuffle": (lambda self, y: self.lin(F.pixel_shuffle(y, 2).mean((2, 3))), 2, 1),
    "flip and roll": (lambda self, y: self.lin(y.flip(-1).roll(1, 2).mean((2, 3))), 8, 1),
    "twice": (lambda self, y: self.lin(torch.cat([y, y], 1).amax((2, 3))), 8, 2),
    "flatten": (lambda self, y: self.lin(F.adaptive_max_pool2d(y, 2).reshape(y.shape[0], -1)), 8, 4),
    "squeeze": (lambda self, y: self.lin(y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)), 8, 1),
    "stack": (lambda self, y: self.lin(torch.stack([y, y.relu()], 0).sum(0).mean((2, 3))), 8, 1),
    "pool": (lambda self, y: self.lin(F.avg_pool2d(F.max_pool2d(y, 2), 2).flatten(1)), 8, 1),
    "repeat": (lambda self, y: self.lin(y.repeat(1, 1, 2, 2).mean((2, 3))), 8, 1),
}


@pytest.mark.parametrize(("move", "size", "columns"), MOVES.values(), ids=MOVES.keys())
def test_data_movement_moves_owners(move, size, columns):
    model = Wired(lambda self, x: self.head(move(self, self.a(x).relu()).relu()), a=nn.Conv2d(3, 8, 1))
    model.lin, model.head = nn.Linear(size * columns, 5), nn.Linear(5, 2)
    x = images(4, size=4)[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": size, "lin": 5}
    rows = 8 // size
    assert owned(groups["a"]) == {"a.weight@0": rows, "a.bias@0": rows, "lin.weight@1": columns}
    assert unsafe_groups(model, [groups["a"], groups["lin"]], x) == {}


REFUSED = {
    "softmax": (lambda self, y: self.inner(y).softmax(1), nn.Identity(), "no rule for aten.softmax.int"),
    "layer norm": (lambda self, y: self.inner(y), nn.LayerNorm(6), "no rule for aten.layer_norm.default in inner"),
    "prelu": (lambda self, y: self.inner(y), nn.PReLU(6), "no rule for aten.prelu.default in inner"),
    "matmul": (lambda self, y: (y @ y.T) @ y, nn.Identity(), "no rule for aten.matmul"),
    "divisor": (lambda self, y: y / (1 + y.exp()), nn.Identity(), "no rule for aten.div.Tensor"),
    "computed weight": (
        lambda self, y: self.inner(y),
        parametrizations.weight_norm(nn.Linear(6, 6)),
        "the weight of aten.linear.default in inner is computed",
    ),
    "transposed weight": (lambda self, y: y @ self.inner.weight.T, nn.Linear(6, 6, bias=False), "no rule for aten."),
    "elementwise parameter": (lambda self, y: y * self.inner.weight, nn.Embedding(1, 6), "no rule for aten.mul.Tensor"),
    "averaged parameter": (
        lambda self, y: F.linear(y, self.inner.weight - self.inner.weight.mean(1, keepdim=True)),
        nn.Linear(6, 6, bias=False),
        "the weight of aten.linear.default is computed",
    ),
    "used twice": (
        lambda self, y: self.inner(self.inner(y).relu()),
        nn.Linear(6, 6),
        "the weight inner.weight is used more than once",
    ),
}


@pytest.mark.parametrize(("wiring", "inner", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_rule_freezes_what_it_reads_and_says_why(wiring, inner, reason):
    model = Wired(lambda self, x: self.head(wiring(self, self.a(x))), inner=inner, a=nn.Linear(4, 6))
    model.head = nn.Linear(6, 2)
    groups = groups_of(model.eval(), normal(3, 4))
    assert free(groups) == {}
    assert groups["a"].frozen.startswith(reason)


def test_a_weight_under_two_names_is_used_twice():
    model = Wired(lambda self, x: self.head(self.c(self.b(self.a(x).relu()).relu())), a=nn.Linear(4, 6))
    model.b, model.c, model.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    model.c.weight = model.b.weight
    groups = groups_of(model, normal(3, 4))
    assert free(groups) == {}
    assert "is used more than once" in groups["a"].frozen


def test_a_grouped_convolution_loses_the_same_channels_in_every_group():
    model = Wired(lambda self, x: self.head(self.g(self.a(x).relu()).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.g, model.head = nn.Conv2d(6, 8, 3, groups=2), nn.Linear(8, 2)
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 3, "g": 4}
    assert owned(groups["a"]) == {"a.weight@0": 2, "a.bias@0": 2, "g.weight@1": 1}
    assert groups["a"].rows("a.weight").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert owned(groups["g"]) == {"g.weight@0": 2, "g.bias@0": 2, "head.weight@1": 2}


@pytest.mark.parametrize("multiplier", [1, 3])
def test_a_depthwise_convolution_rides_along(multiplier):
    model = Wired(lambda self, x: self.head(self.d(self.a(x).relu()).mean((2, 3))), a=nn.Conv2d(3, 4, 1))
    model.d, model.head = nn.Conv2d(4, 4 * multiplier, 3, groups=4), nn.Linear(4 * multiplier, 2)
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 4}
    m = multiplier
    assert owned(groups["a"]) == {"a.weight@0": 1, "a.bias@0": 1, "d.weight@0": m, "d.bias@0": m, "head.weight@1": m}
    assert groups["a"].writers == ("a.weight", "d.weight")


@pytest.mark.parametrize("divide", [lambda y: y / 3, lambda y: y.mul(2).div(0.5).sub(1).pow(2).clamp(0, 5)])
def test_scalars_own_nothing(divide):
    model = Wired(lambda self, x: self.b(divide(self.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    assert free(groups_of(model, normal(3, 4))) == {"a": 6}


def test_a_sum_over_channels_makes_them_one_neuron():
    model = Wired(lambda self, x: self.b(self.a(x).mean(1, keepdim=True)), a=nn.Linear(4, 6), b=nn.Linear(1, 2))
    groups = groups_of(model, normal(3, 4))
    assert free(groups) == {"a": 1} and owned(groups["a"])["a.weight@0"] == 6


def test_a_batch_norm_used_twice_couples_both_its_layers():
    def wiring(self, x):
        return self.head(torch.cat([self.n(self.a(x)), self.n(self.b(x))], 1).relu())

    model = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), n=nn.BatchNorm1d(6), head=nn.Linear(12, 2))
    groups = groups_of(model, normal(3, 4))
    assert free(groups) == {"a": 6}
    assert owned(groups["a"])["head.weight@1"] == 2 and owned(groups["a"])["n.weight@0"] == 1


def outer(self, x):
    return self.head((self.a(x)[:, :, None] * self.b(x)[:, None, :]).flatten(1))


@pytest.mark.parametrize(("a", "b"), [(4, 5), (5, 4), (4, 4)])
def test_of_an_outer_product_at_most_one_side_can_be_pruned(a, b):
    model = Wired(outer, a=nn.Linear(3, a), b=nn.Linear(3, b), head=nn.Linear(a * b, 2))
    x = normal(3, 3)
    groups = groups_of(model, x)
    assert len(free(groups)) <= 1
    assert unsafe_groups(model, [groups[name] for name in free(groups)], x) == {}
