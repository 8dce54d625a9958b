import pytest
import torch
from networks import images
from torch import nn
from torch.nn import functional as F
from wiring import Wired, free, frozen, groups_of, normal, owned, unsafe_groups


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


def test_a_batch_norm_used_twice_couples_both_its_layers():
    def wiring(self, x):
        return self.head(torch.cat([self.n(self.a(x)), self.n(self.b(x))], 1).relu())

    model = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), n=nn.BatchNorm1d(6), head=nn.Linear(12, 2))
    groups = groups_of(model, normal(3, 4))
    assert free(groups) == {"a": 6}
    assert owned(groups["a"])["head.weight@1"] == 2 and owned(groups["a"])["n.weight@0"] == 1


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
