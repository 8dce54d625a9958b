import pytest
import torch
from networks import MLP, DigitNet, FlattenNet, PlainNet, PreActNet, images, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired, free, frozen, groups_of, normal, once, owned

import singe
from singe.graph.analysis import find_groups
from singe.graph.trace import trace


def bn(name):
    return (f"{name}.weight", f"{name}.bias", f"{name}.running_mean", f"{name}.running_var")


def test_plain_network():
    groups = groups_of(randomised(PlainNet()), images()[0])
    assert free(groups) == {"features.0": 7, "features.4": 9, "features.7": 6, "classifier.0": 11}
    assert frozen(groups) == {"classifier.3": "network output"}
    assert [owned(g) for g in groups.values()] == [
        once("features.0.weight", "features.0.bias", *bn("features.1"), "features.4.weight@1"),
        once("features.4.weight", "features.5.running_mean", "features.5.running_var", "features.7.weight@1"),
        once("features.7.weight", "features.7.bias", "classifier.0.weight@1"),
        once("classifier.0.weight", "classifier.0.bias", "classifier.3.weight@1"),
        once("classifier.3.weight", "classifier.3.bias"),
    ]
    assert groups["features.0"].writers == ("features.0.weight",)
    assert groups["features.0"].members == ("features.0", "features.1")


def test_flattening_gives_a_channel_one_column_per_position():
    groups = groups_of(randomised(FlattenNet()), images()[0])
    assert free(groups) == {"conv": 5, "hidden": 8} and frozen(groups) == {"head": "network output"}
    conv = groups["conv"]
    assert owned(conv) == once("conv.weight", "conv.bias") | {"hidden.weight@1": 4}
    assert torch.equal(conv.read("hidden.weight").neuron, torch.arange(5).repeat_interleave(4))
    assert owned(groups["hidden"]) == once("hidden.weight", "hidden.bias", *bn("norm"), "head.weight@1")


def test_residual_streams_are_one_group_with_their_shortcuts_and_stem():
    groups = groups_of(randomised(DigitNet(4)), images(channels=1)[0])
    assert free(groups) == {
        "stem": 4, "blocks.0.conv1": 4, "blocks.1.conv1": 8, "blocks.1.conv2": 8, "blocks.2.conv1": 16,
        "blocks.2.conv2": 16,
    }  # fmt: skip
    assert frozen(groups) == {"head": "network output"}
    assert groups["stem"].writers == ("stem.weight", "blocks.0.conv2.weight")
    readers = ("blocks.0.conv1.weight@1", "blocks.1.conv1.weight@1", "blocks.1.down.0.weight@1")
    assert owned(groups["stem"]) == once(*groups["stem"].writers, *bn("bn"), *bn("blocks.0.bn2"), *readers)
    second = groups["blocks.1.conv2"]
    assert set(second.writers) == {"blocks.1.conv2.weight", "blocks.1.down.0.weight"}
    readers = ("blocks.2.conv1.weight@1", "blocks.2.down.0.weight@1")
    assert owned(second) == once(*second.writers, *bn("blocks.1.bn2"), *bn("blocks.1.down.1"), *readers)
    assert owned(groups["blocks.1.conv1"]) == once(
        "blocks.1.conv1.weight", *bn("blocks.1.bn1"), "blocks.1.conv2.weight@1"
    )


def test_batch_norms_in_front_of_convolutions_belong_to_the_stream():
    groups = groups_of(randomised(PreActNet()), images()[0])
    assert free(groups) == {"stem": 6, "conv1": 5}
    assert owned(groups["stem"]) == once(
        "stem.weight", "stem.bias", "conv2.weight", "conv2.bias", *bn("bn1"), *bn("bn3"), "conv1.weight@1",
        "head.weight@1",
    )  # fmt: skip
    assert owned(groups["conv1"]) == once("conv1.weight", *bn("bn2"), "conv2.weight@1")


def test_linear_layers_on_sequences_own_the_last_axis():
    groups = groups_of(randomised(MLP()), normal(3, 6, 10))
    assert free(groups) == {"layers.0": 12, "layers.2": 9}
    assert owned(groups["layers.0"]) == once("layers.0.weight", "layers.0.bias", "layers.2.weight@1")


def concatenated(self, x):
    return self.c(torch.cat([self.a(x).relu(), self.b(x)], 1)).mean((2, 3))


def test_concatenated_layers_share_a_reader_and_stay_apart():
    model = Wired(concatenated, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 5, 1), c=nn.Conv2d(9, 3, 1))
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 4, "b": 5}
    assert groups["a"].read("c.weight").neuron.tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1]
    assert groups["b"].read("c.weight").neuron.tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, 4]


def halves(self, x):
    y = self.a(x).relu()
    return (self.b(y[:, :5]) + self.c(y[:, 5:])).mean((2, 3))


def test_a_layer_read_in_parts_is_as_many_groups():
    model = Wired(halves, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(5, 4, 1), c=nn.Conv2d(7, 4, 1))
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 5, "a#2": 7}
    assert owned(groups["a#2"]) == once("a.weight", "a.bias", "c.weight@1")
    assert groups["a#2"].rows("a.weight").flatten().tolist() == list(range(5, 12))


def partly_read(self, x):
    return self.b(self.a(x).relu()[:, :4])


def test_neurons_that_nothing_reads_are_frozen():
    groups = groups_of(Wired(partly_read, a=nn.Linear(6, 7), b=nn.Linear(4, 3)), normal(3, 6))
    assert free(groups) == {"a": 4}
    assert frozen(groups) == {"a#2": "nothing reads it", "b": "network output"}


def dead_end(self, x):
    y = self.a(x).relu()
    self.dead(y)
    return self.b(y)


def test_a_layer_whose_result_is_dropped_does_not_stop_the_analysis():
    groups = groups_of(Wired(dead_end, a=nn.Linear(6, 5), dead=nn.Linear(5, 2), b=nn.Linear(5, 3)), normal(3, 6))
    assert owned(groups["a"]).keys() >= {"a.weight@0", "b.weight@1"}
    assert "dead" not in free(groups)


def input_added(self, x):
    y = self.a(x)
    return self.head((x + y).mean((2, 3)))


def test_a_stream_that_carries_the_input_is_frozen():
    model = Wired(input_added, a=nn.Conv2d(3, 3, 1), head=nn.Linear(3, 2))
    assert frozen(groups_of(model, images()[0])) == {"a": "network input", "head": "network output"}


def several_outputs(self, x):
    y = self.a(x).relu()
    z = self.b(y)
    return {"features": z, "logits": self.head(z.relu())}


def test_every_output_is_frozen_and_nothing_else():
    model = Wired(several_outputs, a=nn.Linear(6, 5), b=nn.Linear(5, 4), head=nn.Linear(4, 3))
    groups = groups_of(model, normal(3, 6))
    assert frozen(groups) == {"b": "network output", "head": "network output"} and free(groups) == {"a": 5}


def test_a_batch_norm_at_the_end_is_an_output():
    model = Wired(lambda self, x: self.n(self.b(self.a(x).relu())), a=nn.Linear(6, 5), b=nn.Linear(5, 3))
    model.n = nn.BatchNorm1d(3).eval()
    assert frozen(groups_of(model, normal(3, 6))) == {"b": "network output"}


def test_a_shared_module_goes_by_the_name_that_named_modules_gives():
    def wiring(self, x):
        return self.c(self.again(self.b(self.n(self.a(x)).relu())).relu())

    model = Wired(wiring, a=nn.Linear(4, 5), n=nn.BatchNorm1d(5), b=nn.Linear(5, 5), c=nn.Linear(5, 3))
    model.again = model.n
    names = {name for name, _ in model.named_modules()}
    assert {m for g in groups_of(model, normal(3, 4)).values() for m in g.members} == names - {""}


@pytest.mark.parametrize("rank", [1, 2])
def test_a_convolution_and_a_transposed_one_with_one_weight_are_left_whole(rank):
    conv, transposed = (getattr(nn, f"{name}{rank}d") for name in ("Conv", "ConvTranspose"))
    model = Wired(
        lambda m, x: m.d(m.n(m.m(m.c(x).relu()).relu()).relu()),
        c=conv(3, 12, 3, padding=1), m=conv(12, 14, 1), n=conv(14, 12, 1), d=transposed(12, 3, 3, padding=1),
    )  # fmt: skip
    model.d.weight = model.c.weight
    x = normal(4, 3, *[6] * rank)
    by_name = {g.name: g.frozen for g in find_groups(trace(model, x))}
    assert by_name["m"] is None and "the weight c.weight" in by_name["c"]
    result = singe.prune(
        model, [(x, x)], 0.2, loss=lambda o, b: F.mse_loss(o, b[0]), images=4, finetune=None, progress=False
    )
    assert {record.group for record in result.history} == {"m"}


@pytest.mark.parametrize("channels", [4, 6])
def test_a_weight_that_a_convolution_and_two_transposed_ones_take_is_left_whole(channels):
    def wiring(m, x):
        y = F.conv_transpose2d(m.c(x).relu(), m.c.weight)
        return m.d(y.relu() + F.conv_transpose2d(m.n(m.c(x).relu()).relu(), m.c.weight))

    model = Wired(wiring, c=nn.Conv2d(channels, 6, 3), n=nn.Conv2d(6, 6, 1), d=nn.Conv2d(channels, 3, 1))
    groups = find_groups(trace(model, normal(2, channels, 6, 6)))
    assert all(group.frozen for group in groups if "c.weight" in {s.tensor for s in group.slices})
    assert {group.size for group in groups} <= {3, channels, 6}
