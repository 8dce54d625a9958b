import torch
from networks import MLP, MobileNet, PlainNet, images, randomised
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from wiring import Wired, normal

from singe.graph.trace import trace
from singe.graph.weights import find_weights


def weights_of(model, x):
    return find_weights(trace(model, x), model)


def test_all_weights_of_convolutions_and_linear_layers_are_found_in_execution_order():
    model = randomised(PlainNet())
    found = weights_of(model, images()[0])
    assert [w.name for w in found.prunable] == [f"features.{i}.weight" for i in (0, 4, 7)] + [
        f"classifier.{i}.weight" for i in (0, 3)
    ]
    assert not found.other
    assert (
        found.total == sum(w.size for w in found.prunable) == sum(p.numel() for p in model.parameters() if p.dim() > 1)
    )


def test_the_order_is_that_of_execution_and_not_that_of_the_modules():
    model = Wired(lambda m, x: m.a(F.relu(m.b(x))), a=nn.Linear(6, 4), b=nn.Linear(5, 6))
    assert [w.name for w in weights_of(model, normal(3, 5)).prunable] == ["b.weight", "a.weight"]


def test_depthwise_grouped_transposed_and_other_ranks_count():
    def wiring(m, x):
        x = m.up(F.relu(m.grouped(m.deep(x)))).flatten(2)
        return m.three(m.one(x)[:, None, :, :, None]).flatten(1)

    deep, grouped = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, groups=2)
    up, one = nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv1d(4, 3, 49)
    model = Wired(wiring, deep=deep, grouped=grouped, up=up, one=one, three=nn.Conv3d(1, 2, (3, 1, 1)))
    found = weights_of(model, normal(2, 4, 8, 8))
    assert {w.name: w.size for w in found.prunable} == {
        "deep.weight": 36, "grouped.weight": 12, "up.weight": 48, "one.weight": 588, "three.weight": 6
    }  # fmt: skip
    assert len(weights_of(randomised(MobileNet()), images()[0]).prunable) == 8


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.twice, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.twice(self.twice(self.table(x).mean(1)).relu()))


def test_a_tied_weight_is_one_that_all_its_modules_hold_and_embeddings_alone_do_not_count():
    found = weights_of(Tied(), torch.arange(12).view(3, 4) % 9)
    assert [(w.name, w.size, w.members) for w in found.prunable] == [
        ("twice.weight", 36, ("twice",)), ("table.weight", 54, ("table", "head"))
    ]  # fmt: skip
    assert found.total == 90


def test_what_no_operator_takes_as_it_is_is_reported_and_counts():
    model = Wired(lambda m, x: m.b(m.a(x)) @ m.c.weight, a=nn.Linear(5, 6), b=nn.Linear(6, 4), c=nn.Linear(3, 4),
                  aux=nn.Conv1d(2, 3, 1))  # fmt: skip
    weight_norm(model.a)
    found = weights_of(model, normal(3, 5))
    assert [w.name for w in found.prunable] == ["b.weight"]
    assert set(found.other) == {"a.parametrizations.weight.original1", "c.weight", "aux.weight"}
    assert "is computed" in found.other["a.parametrizations.weight.original1"]
    assert (
        found.other["c.weight"] == found.other["aux.weight"] == "no convolution or linear layer reads it in eval mode"
    )
    assert found.total == 30 + 24 + 12 + 6


def test_buffers_and_activations_are_no_weights():
    model = MLP()
    model.register_buffer("kernel", normal(3, 10))
    model.forward = lambda x: model.layers(x) + (x @ x.T) @ F.linear(x, model.kernel).sum(1, keepdim=True)
    found = weights_of(model.eval(), normal(4, 10))
    assert [w.name for w in found.prunable] == [f"layers.{i}.weight" for i in (0, 2, 4)] and not found.other
