import pytest
import torch
from networks import images, shuffled
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from wiring import Wired, free, frozen, groups_of, normal, once, owned

from singe.graph.analysis import analyse
from singe.graph.trace import trace
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


def fixed(batch, channels, *size):
    return torch.full((batch, channels, *size), 0.5)


PADS = {
    "F.pad": (lambda y: F.pad(y, (0, 0, 0, 0, 0, 4)), 0),
    "both sides": (lambda y: F.pad(y, (0, 0, 0, 0, 3, 1)), 3),
    "F.pad with ones": (lambda y: F.pad(y, (0, 0, 0, 0, 2, 2), value=1.0), 2),
    "zeros": (lambda y: torch.cat([y, torch.zeros(y.shape[0], 4, *y.shape[2:])], 1), 0),
    "new_zeros": (lambda y: torch.cat([y.new_zeros(y.shape[0], 4, *y.shape[2:]), y], 1), 4),
    "any constant": (lambda y: torch.cat([fixed(y.shape[0], 2, 8, 8), y, fixed(y.shape[0], 2, 8, 8)], 1), 2),
}


def joined(pad):
    """Channels of ``a`` beside what ``pad`` puts there, in a sum with ``b``."""

    def wiring(self, x):
        y = self.a(x).relu()
        return self.head((pad(y) + self.b(y)).relu().mean((2, 3)))

    return wiring


@pytest.mark.parametrize(("pad", "first"), PADS.values(), ids=PADS.keys())
def test_padded_channels_freeze_what_joins_them_and_not_what_stands_beside_them(pad, first):
    model = Wired(joined(pad), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 10, 1), head=nn.Linear(10, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert owned(groups["a"]) == once("a.weight", "a.bias", "b.weight", "b.bias", "b.weight@1", "head.weight@1")
    assert free(groups) == {"a": 6}
    assert groups["a"].rows("b.weight").flatten().tolist() == list(range(first, first + 6))
    assert groups["b"].size == 4 and groups["b"].frozen.startswith("joins constants of a fixed width (aten.")
    assert unsafe_groups(model, [groups["a"]], x) == {}


SHRINKING = {
    "zeros_like": lambda y: torch.cat([y, torch.zeros_like(y)], 1),
    "times zero": lambda y: torch.cat([y, y.mul(0)], 1),
}


@pytest.mark.parametrize("pad", SHRINKING.values(), ids=SHRINKING.keys())
def test_zeros_as_wide_as_a_layer_shrink_with_it(pad):
    model = Wired(joined(pad), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 12, 1), head=nn.Linear(12, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert groups["a"].rows("b.weight").tolist() == [[n, n + 6] for n in range(6)]
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_constants_that_are_only_read_freeze_nothing():
    def wiring(self, x):
        y = self.a(x).relu()
        rows = torch.arange(8.0).view(1, 1, 8, 1).expand(y.shape[0], 1, 8, 8)
        return self.head(self.b(torch.cat([rows, y], 1)).relu().mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(7, 5, 3), head=nn.Linear(5, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6, "b": 5}
    assert groups["a"].slice("b.weight", 1).neuron.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert unsafe_groups(model, [groups["a"], groups["b"]], x) == {}


def test_a_depthwise_convolution_behind_padded_channels_keeps_its_rows_for_them():
    model = Wired(lambda self, x: self.head(self.d(F.pad(self.a(x), (0, 0, 0, 0, 1, 1))).mean((2, 3))))
    model.a, model.d, model.head = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 4} and groups["d"].size == 2
    assert groups["a"].rows("d.weight").flatten().tolist() == [1, 2, 3, 4]
    assert unsafe_groups(model, [groups["a"]], x) == {}


SPATIAL = {
    "F.pad": lambda y: F.pad(y, (1, 1, 2, 0)),
    "with ones": lambda y: F.pad(y, (1, 1), value=1.0),
    "cropped": lambda y: F.pad(y, (-1, -1)),
    "module": nn.ZeroPad2d(2),
    "rows of zeros": lambda y: torch.cat([y, torch.zeros(y.shape[0], y.shape[1], 2, y.shape[3])], 2),
    "columns like it": lambda y: torch.cat([torch.zeros_like(y[:, :, :, :1]), y], 3),
}


@pytest.mark.parametrize("pad", SPATIAL.values(), ids=SPATIAL.keys())
def test_padding_of_positions_freezes_nobody(pad):
    model = Wired(lambda self, x: self.head(self.b(pad(self.a(pad(x)).relu())).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.b, model.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6, "b": 5}
    assert owned(groups["a"]) == once("a.weight", "a.bias", "b.weight@1")
    assert unsafe_groups(model, [groups["a"], groups["b"]], x) == {}


def test_padding_of_positions_that_were_channels_freezes_nobody():
    model = Wired(lambda self, x: self.head(self.b(F.pad(F.pixel_shuffle(self.a(x).relu(), 2), (1, 1))).mean((2, 3))))
    model.a, model.b, model.head = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 5, 3), nn.Linear(5, 2)
    assert free(groups_of(model, images()[0])) == {"a": 2, "b": 5}


def test_constants_beside_a_single_channel_freeze_what_joins_them():
    model = Wired(joined(lambda y: F.pad(y, (0, 0, 0, 0, 1, 2))), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 4, 1))
    model.head = nn.Linear(4, 2)
    assert free(groups_of(model, images()[0])) == {"a": 1}


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_positions_freezes_nobody(mode):
    model = Wired(lambda self, x: self.head(self.b(self.a(x).relu()).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.b, model.head = nn.Conv2d(6, 5, 3, padding=1, padding_mode=mode), nn.Linear(5, 2)
    assert free(groups_of(model, images()[0])) == {"a": 6, "b": 5}


def turned(count):
    return torch.arange(count).flip(0)


def twos(count):
    return torch.full((count,), 2)


def empty(y):
    return y[:, :0].flatten(2).unflatten(2, y.shape[2:])


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
    "picked": (lambda self, y: self.lin(y.amax((2, 3)).index_select(1, turned(y.shape[1]))), 8, 1),
    "indexed": (lambda self, y: self.lin(y.amax((2, 3))[:, turned(y.shape[1])]), 8, 1),
    "repeated so often": (lambda self, y: self.lin(y.amax((2, 3)).repeat_interleave(twos(y.shape[1]), 1)), 8, 2),
    "beside nothing": (lambda self, y: self.lin(torch.cat([empty(y), y], 1).amax((2, 3))), 8, 1),
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
    "softmax": (lambda self, y: self.inner(y).softmax(1), nn.Identity(), "taken together by aten.softmax.int"),
    "layer norm": (
        lambda self, y: self.inner(y),
        nn.LayerNorm(6),
        "normalised across channels by aten.layer_norm.default in inner",
    ),
    "group norm": (
        lambda self, y: self.inner(y),
        nn.GroupNorm(2, 6),
        "normalised across channels by aten.group_norm.default in inner",
    ),
    "mean": (lambda self, y: y - y.mean(1, keepdim=True), nn.Identity(), "taken together by aten.mean.dim"),
    "largest": (lambda self, y: y - y.amax(1, keepdim=True), nn.Identity(), "taken together by aten.amax"),
    "outer product": (
        lambda self, y: (y[:, :, None] @ y[:, None, :]).sum(2),
        nn.Identity(),
        "multiplied with what cannot go by aten.matmul",
    ),
    "sorted": (lambda self, y: y.sort(1).values, nn.Identity(), "no rule for aten.sort"),
    "divisor": (lambda self, y: y / (1 + y.exp()), nn.Identity(), "aten.div.Tensor divides by it"),
    "picked by size": (
        lambda self, y: y.index_select(1, self.inner.weight[0].argsort()),
        nn.Embedding(1, 6),
        "no rule for aten.index_select",
    ),
    "computed norm": (
        lambda self, y: F.batch_norm(y, self.inner.running_mean, self.inner.running_var, self.inner.weight.exp()),
        nn.BatchNorm1d(6),
        "the weight of aten.batch_norm.default is computed",
    ),
    "computed weight": (
        lambda self, y: self.inner(y),
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        "the weight of aten.linear.default in inner is computed",
    ),
    "transposed weight": (
        lambda self, y: y @ self.inner.weight.T,
        nn.Linear(6, 6, bias=False),
        "aten.matmul.default multiplies with a parameter",
    ),
    "computed shift": (
        lambda self, y: y + self.inner.weight.exp(),
        nn.Embedding(1, 6),
        "added to a computed parameter by aten.add.Tensor",
    ),
    "averaged parameter": (
        lambda self, y: F.linear(y, self.inner.weight - self.inner.weight.mean(1, keepdim=True)),
        nn.Linear(6, 6, bias=False),
        "the weight of aten.linear.default is computed",
    ),
}


@pytest.mark.parametrize(("wiring", "inner", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_rule_freezes_what_it_reads_and_says_why(wiring, inner, reason):
    model = Wired(lambda self, x: self.head(wiring(self, self.a(x))), inner=inner, a=nn.Linear(4, 6))
    model.head = nn.Linear(6, 2)
    groups = groups_of(model.eval(), normal(3, 4))
    assert free(groups) == {}
    assert groups["a"].frozen.startswith(reason)


FOLLOWED = {
    "slopes": (lambda self, y: self.inner(y), nn.PReLU(6), {"inner.weight@0": 1}),
    "scales": (lambda self, y: y * self.inner.weight, nn.Embedding(1, 6), {"inner.weight@1": 1}),
    "shifts": (lambda self, y: y - self.inner.weight[0], nn.Embedding(1, 6), {"inner.weight@1": 1}),
    "one for all": (lambda self, y: y * self.inner.weight, nn.Embedding(1, 1), {}),
    "twice": (
        lambda self, y: self.inner(self.inner(y).relu()),
        nn.Linear(6, 6),
        {"inner.weight@0": 1, "inner.weight@1": 1, "inner.bias@0": 1},
    ),
    "itself": (lambda self, y: (y @ y.T) @ y, nn.Identity(), {}),
    "length": (lambda self, y: F.normalize(y, dim=1), nn.Identity(), {}),
    "products": (lambda self, y: y * (y * y).sum(1, keepdim=True), nn.Identity(), {}),
}


@pytest.mark.parametrize(("wiring", "inner", "rides"), FOLLOWED.values(), ids=FOLLOWED.keys())
def test_what_neurons_meet_on_their_way_goes_with_them(wiring, inner, rides):
    model = Wired(lambda self, x: self.head(wiring(self, self.a(x))), inner=inner, a=nn.Linear(4, 6))
    model.head = nn.Linear(6, 2)
    x = normal(3, 4)
    groups = groups_of(model.eval(), x)
    assert free(groups) == {"a": 6}
    assert owned(groups["a"]) == once("a.weight", "a.bias", "head.weight@1") | rides
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_a_weight_under_two_names_is_one():
    model = Wired(lambda self, x: self.head(self.c(self.b(self.a(x).relu()).relu())), a=nn.Linear(4, 6))
    model.b, model.c, model.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
    model.c.weight = model.b.weight
    x = normal(3, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert groups["a"].writers == ("a.weight", "b.weight")
    assert owned(groups["a"])["c.bias@0"] == 1
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_a_weight_that_writes_and_reads_along_one_axis_is_frozen():
    model = Wired(lambda self, x: F.linear(self.a(x).relu(), self.a.weight.T), a=nn.Linear(4, 6))
    groups = groups_of(model, normal(3, 4))
    assert "is computed" in frozen(groups)["a"]


def test_a_grouped_convolution_loses_the_same_channels_in_every_group():
    model = Wired(lambda self, x: self.head(self.g(self.a(x).relu()).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.g, model.head = nn.Conv2d(6, 8, 3, groups=2), nn.Linear(8, 2)
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 3, "g": 4}
    assert owned(groups["a"]) == {"a.weight@0": 2, "a.bias@0": 2, "g.weight@1": 1}
    assert groups["a"].rows("a.weight").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert owned(groups["g"]) == {"g.weight@0": 2, "g.bias@0": 2, "head.weight@1": 2}


def test_a_grouped_convolution_couples_what_a_concatenation_puts_at_one_place():
    model = Wired(lambda self, x: self.head(self.g(torch.cat([self.a(x), self.b(x)], 1).relu()).mean((2, 3))))
    model.a, model.b, model.g = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(6, 9, 3, groups=3)
    model.head = nn.Linear(9, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 2, "g": 3}
    assert owned(groups["a"]) == {
        "a.weight@0": 1, "a.bias@0": 1, "b.weight@0": 2, "b.bias@0": 2, "g.weight@1": 1,
    }  # fmt: skip
    assert groups["a"].rows("b.weight").tolist() == [[0, 2], [1, 3]]
    assert unsafe_groups(model, [groups["a"], groups["g"]], x) == {}


@pytest.mark.parametrize("shuffle", [lambda y: shuffled(y, 2), nn.ChannelShuffle(2)], ids=["views", "module"])
def test_channels_shuffled_between_grouped_convolutions_go_with_their_places_in_both(shuffle):
    model = Wired(lambda self, x: self.head(self.h(shuffle(self.g(x).relu())).mean((2, 3))))
    model.g, model.h, model.head = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 3, groups=2), nn.Linear(4, 2)
    x = images(channels=4)[0]
    groups = groups_of(model, x)
    assert free(groups) == {"g": 2, "h": 2}
    # rows 0 to 3 and 4 to 7 are its groups; shuffled, they are 0 4 1 5 and 2 6 3 7
    assert groups["g"].rows("g.weight").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups["g"].slice("h.weight", 1).neuron.tolist() == [0, 0, 1, 1]
    assert unsafe_groups(model, [groups["g"], groups["h"]], x) == {}


def test_channels_shuffled_behind_an_ordinary_convolution_go_with_their_places_in_both_halves():
    model = Wired(lambda self, x: self.head(self.b(shuffled(self.a(x).relu(), 2)).mean((2, 3))), a=nn.Conv2d(3, 8, 1))
    model.b, model.head = nn.Conv2d(8, 5, 3), nn.Linear(5, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert unsafe_groups(model, [groups["a"]], x) == {}
    assert groups["a"].rows("a.weight").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


RANKS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("kind", RANKS)
def test_a_depthwise_convolution_rides_along(kind, multiplier):
    def wiring(self, x):
        return self.head(self.d(self.a(x).relu()).flatten(2).mean(2))

    model, m = Wired(wiring, a=kind(3, 4, 1), d=kind(4, 4 * multiplier, 3, groups=4)), multiplier
    model.head = nn.Linear(4 * m, 2)
    groups = groups_of(model, normal(2, 3, *[5] * (RANKS.index(kind) + 1)))
    assert free(groups) == {"a": 4}
    assert owned(groups["a"]) == {"a.weight@0": 1, "a.bias@0": 1, "d.weight@0": m, "d.bias@0": m, "head.weight@1": m}
    assert groups["a"].rows("d.weight").tolist() == [[m * n + i for i in range(m)] for n in range(4)]
    assert groups["a"].writers == ("a.weight", "d.weight")


def test_a_grouped_convolution_behind_a_depthwise_one_couples_the_neurons_that_pass_through_it():
    model = Wired(lambda self, x: self.head(self.g(self.d(self.a(x)).relu()).mean((2, 3))), a=nn.Conv2d(3, 4, 1))
    model.d, model.g, model.head = nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 6, 3, groups=2), nn.Linear(6, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 2, "g": 3}
    assert owned(groups["a"]) == {
        "a.weight@0": 2, "a.bias@0": 2, "d.weight@0": 4, "d.bias@0": 4, "g.weight@1": 2,
    }  # fmt: skip
    assert groups["a"].rows("a.weight").tolist() == [[0, 2], [1, 3]]
    assert unsafe_groups(model, [groups["a"], groups["g"]], x) == {}


def test_a_depthwise_convolution_of_the_input_is_frozen_and_what_reads_it_is_not():
    model = Wired(lambda self, x: self.head(self.a(self.d(x)).relu().mean((2, 3))), d=nn.Conv2d(3, 6, 3, groups=3))
    model.a, model.head = nn.Conv2d(6, 5, 1), nn.Linear(5, 2)
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 5}
    assert frozen(groups)["d"] == "network input"


def in_a_row(self, x):
    return self.d(self.d(self.a(x).relu()).relu())


def side_by_side(self, x):
    return self.d(self.a(x)) * self.d(self.b(x).relu())


@pytest.mark.parametrize("wiring", [in_a_row, side_by_side])
def test_a_depthwise_weight_used_twice_couples_all_that_passes_through_it(wiring):
    model = Wired(lambda self, x: self.head(wiring(self, x).mean((2, 3))), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    model.d, model.head = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Linear(4, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 4}
    assert unsafe_groups(model, [groups["a"]], x) == {}


def pooled(pool, size):
    return lambda y: pool(y, size).flatten(1)


POOLS = {
    "1d": (pooled(F.adaptive_max_pool1d, 2), 1, 2),
    "2d": (pooled(F.adaptive_max_pool2d, (1, 3)), 2, 3),
    "2d with places": (lambda y: F.adaptive_max_pool2d(y, 2, return_indices=True)[0].flatten(1), 2, 4),
    "3d": (pooled(F.adaptive_max_pool3d, 2), 3, 8),
    "means": (pooled(F.adaptive_avg_pool3d, (2, 1, 2)), 3, 4),
}


@pytest.mark.parametrize(("pool", "rank", "columns"), POOLS.values(), ids=POOLS.keys())
def test_adaptive_pooling_keeps_channels_apart(pool, rank, columns):
    kind = RANKS[rank - 1]
    model = Wired(lambda self, x: self.head(pool(self.a(x).relu())), a=kind(3, 4, 1), head=nn.Linear(4 * columns, 2))
    x = normal(2, 3, *[5] * rank)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 4}
    assert owned(groups["a"]) == {"a.weight@0": 1, "a.bias@0": 1, "head.weight@1": columns}
    assert unsafe_groups(model, [groups["a"]], x) == {}


CASTS = {
    "float": lambda y: y.float(),
    "to": lambda y: y.to(torch.float32),
    "to another": lambda y: y.to(torch.zeros(1)),
    "there and back": lambda y: y.double().float(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_a_cast_changes_nobody(cast):
    model = Wired(lambda self, x: self.b(cast(self.a(cast(x)).relu())), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    x = normal(3, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert unsafe_groups(model, [groups["a"]], x) == {}


@pytest.mark.parametrize("divide", [lambda y: y / 3, lambda y: y.mul(2).div(0.5).sub(1).pow(2).clamp(0, 5)])
def test_scalars_own_nothing(divide):
    model = Wired(lambda self, x: self.b(divide(self.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    assert free(groups_of(model, normal(3, 4))) == {"a": 6}


def test_channels_that_are_only_summed_go_one_by_one():
    model = Wired(lambda self, x: self.b(self.a(x).relu().sum(1, keepdim=True)), a=nn.Linear(4, 6), b=nn.Linear(1, 2))
    x = normal(3, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_branches_that_are_summed_lose_the_same_channels():
    def wiring(self, x):
        y = self.a(x).relu().view(len(x), 2, 3, 8, 8)
        return self.head((y * y.mean((3, 4), keepdim=True).softmax(1)).sum(1).mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), head=nn.Linear(3, 2))
    assert free(groups_of(model, images()[0])) == {"a": 3}


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


UPSAMPLINGS = {
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "exact": lambda y: F.interpolate(y, size=(13, 11), mode="nearest-exact"),
    "bilinear": lambda y: F.interpolate(y, scale_factor=1.5, mode="bilinear", align_corners=False),
    "bicubic": lambda y: F.interpolate(y, size=12, mode="bicubic", antialias=False),
    "at places": lambda y: F.grid_sample(
        y, torch.linspace(-1, 1, 10).view(1, 5, 1, 2).expand(len(y), 5, 6, 2), align_corners=False
    ),
}


@pytest.mark.parametrize("upsample", UPSAMPLINGS.values(), ids=UPSAMPLINGS.keys())
def test_upsampling_keeps_channels_apart(upsample):
    model = Wired(lambda self, x: self.head(self.b(upsample(self.a(x).relu())).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.b, model.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6, "b": 5}
    assert unsafe_groups(model, [groups["a"], groups["b"]], x) == {}


def test_channels_that_tell_where_to_look_stay():
    def wiring(self, x):
        places = torch.tanh(self.flow(x)).permute(0, 2, 3, 1)
        return self.head(F.grid_sample(self.a(x).relu(), places, align_corners=False).mean((2, 3)))

    model = Wired(wiring, flow=nn.Conv2d(3, 2, 1), a=nn.Conv2d(3, 6, 1), head=nn.Linear(6, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert frozen(groups)["flow"] == "tells aten.grid_sampler.default where to look"
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_one_slope_for_all_channels_binds_none():
    model = Wired(
        lambda self, x: self.head(self.act(self.a(x))), a=nn.Linear(4, 6), act=nn.PReLU(), head=nn.Linear(6, 2)
    )
    assert free(groups_of(model, normal(3, 4))) == {"a": 6}


def test_modules_whose_weights_are_not_followed_are_named_with_the_reason():
    model = Wired(lambda self, x: self.head(self.up(self.a(x).flatten(2).mT)[0].mean(1)), a=nn.Conv2d(3, 6, 1))
    model.up, model.head = nn.LSTM(6, 5, batch_first=True), parametrizations.spectral_norm(nn.Linear(5, 2))
    _, unfollowed = analyse(trace(model.eval(), images()[0]))
    assert unfollowed.keys() == {"up", "head"}
    assert "lstm" in unfollowed["up"] and "in head" in unfollowed["head"]


TRANSPOSED = {
    "plain": (6, 4, {}, 6, 4),
    "grouped": (6, 4, {"groups": 2}, 3, 2),
    "depthwise": (6, 6, {"groups": 6}, 6, 0),
    "wide depthwise": (6, 12, {"groups": 6}, 6, 0),
}


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs", "how", "read", "written"), TRANSPOSED.values(), ids=TRANSPOSED.keys())
def test_a_transposed_convolution_is_read_along_its_second_axis(rank, inputs, outputs, how, read, written):
    kind, up = (getattr(nn, f"Conv{t}{rank}d") for t in ("", "Transpose"))
    model = Wired(lambda self, x: self.head(self.up(self.a(x).relu()).relu()).flatten(2).mean(2), a=kind(3, inputs, 1))
    model.up, model.head = up(inputs, outputs, 3, stride=2, **how), kind(outputs, 2, 1)
    x = normal(2, 3, *[4] * rank)
    groups = groups_of(model, x)
    assert free(groups) == {"a": read} | ({"up": written} if written else {})
    assert unsafe_groups(model, [groups[name] for name in free(groups)], x) == {}


class Attention(nn.Module):
    """Whole heads can go if the code asks its attributes how many there are."""

    def __init__(self, by_attribute: bool, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 3, 4, 12
        self.by_attribute, self.fused = by_attribute, fused
        self.qkv, self.proj = nn.Linear(5, 36), nn.Linear(12, 5)

    def forward(self, x):
        b, n = x.shape[:2]
        heads = self.num_heads if self.by_attribute else 3
        q, k, v = self.qkv(x).reshape(b, n, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(b, n, self.attn_dim))


@pytest.mark.parametrize("fused", [True, False])
def test_whole_heads_go_and_the_attributes_that_count_them_follow(fused):
    model, x = Attention(True, fused).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3
    widths = {s.tensor: s.multiplicity for s in group.slices if s.role == "width"}
    assert widths == {"num_heads": 1, "attn_dim": 4}
    assert unsafe_groups(model, [group], x) == {}


class Masked(nn.Module):
    """Attention that may not see everything, or with a bias."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.num_heads = mask, 3
        self.q, self.k, self.v, self.proj = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (self.num_heads, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))


MASKS = {
    "none": (lambda: None, {}),
    "constant": (lambda: nn.Buffer(torch.ones(7, 7).tril().log()), {}),
    "of truth values": (lambda: nn.Buffer(torch.ones(7, 7).tril().bool()), {}),
    "bias of every head": (lambda: nn.Parameter(normal(1, 3, 7, 7)), {"mask@1": 1}),
}


@pytest.mark.parametrize(("mask", "rides"), MASKS.values(), ids=MASKS.keys())
def test_whole_heads_go_whatever_the_mask(mask, rides):
    model, x = Masked(mask()).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3
    layers = {f"{layer}.{kind}@0": 4 for layer in "qkv" for kind in ("weight", "bias")}
    assert owned(group) == layers | {"proj.weight@1": 4, "num_heads@0": 1} | rides
    assert unsafe_groups(model, [group], x) == {}


def test_a_parameter_among_the_factors_of_attention_freezes_what_it_meets():
    def wiring(self, x):
        key, value = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        return self.head(F.scaled_dot_product_attention(self.query, key, value).flatten(1))

    model = Wired(wiring, k=nn.Linear(4, 6), v=nn.Linear(4, 5), head=nn.Linear(10, 2))
    model.query = nn.Parameter(normal(3, 1, 2, 6))
    reasons = frozen(groups_of(model, normal(3, 7, 4)))
    assert all("multiplies with a parameter" in reasons[name] for name in "kv")


def test_heads_that_share_a_key_have_no_rule():
    def wiring(self, x):
        q, k, v = (layer(x).unflatten(2, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    model = Wired(wiring, q=nn.Linear(4, 12), k=nn.Linear(4, 6), v=nn.Linear(4, 6), head=nn.Linear(12, 2))
    reasons = frozen(groups_of(model, normal(2, 7, 4)))
    assert all(reasons[name] == "no rule for aten.scaled_dot_product_attention.default" for name in "qkv")


def test_heads_that_the_code_counts_by_itself_are_found_by_the_trial():
    model, x = Attention(False, True).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert unsafe_groups(model, [group], x).keys() == {group.name}


@pytest.mark.parametrize("equation", ["bid,bjd->bij", "bid,bjd->bji"])
def test_an_einsum_over_channels_reads_them(equation):
    def wiring(self, x):
        y = self.a(x)
        return torch.einsum(equation, y, self.b(x)) @ self.c(x)

    model = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(4, 2))
    x = normal(2, 5, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6} and groups["a"].writers == ("a.weight", "b.weight")
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_a_table_of_biases_loses_a_head_with_the_attention():
    class Biased(Attention):
        def __init__(self) -> None:
            super().__init__(True, False)
            self.table = nn.Parameter(torch.randn(13, 3))
            self.register_buffer("places", torch.arange(7)[:, None] - torch.arange(7)[None] + 6)

        def forward(self, x):
            b, n = x.shape[:2]
            q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
            bias = self.table[self.places.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
            mixed = ((q @ k.transpose(-2, -1)) + bias.unsqueeze(0)).softmax(-1) @ v
            return self.proj(mixed.transpose(1, 2).flatten(2))

    model, x = Biased().eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3 and group.slice("table", 1).multiplicity == 1
    assert unsafe_groups(model, [group], x) == {}
