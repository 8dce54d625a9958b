import pytest
import torch
from networks import randomised
from torch import nn
from wiring import BiasedAttention, Wired, free, groups_of, normal, unsafe_groups

import singe
from singe import reference
from singe.graph.fading import ends_elsewhere
from singe.graph.riders import find_riders
from singe.graph.trace import trace


class FixedNorm(nn.Module):
    """A batch norm of fixed statistics, as detectors have it: a scale and a shift, computed from buffers."""

    def __init__(self, channels, power=1):
        super().__init__()
        self.power = power
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, 0.5 + torch.rand(channels))

    def forward(self, x):
        weight, bias, mean, var = (v.reshape(1, -1, 1, 1) for v in (self.weight, self.bias, self.mean, self.var))
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale + (bias**self.power - mean * scale)


def fixed(power):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), FixedNorm(8, power), nn.ReLU(), nn.Conv2d(8, 6, 3), FixedNorm(6, power)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double().eval()


@pytest.mark.parametrize("power", [1, 2], ids=["linear", "not linear"])
def test_a_computed_shift_fades_if_that_is_to_scale_what_it_is_computed_from(power):
    model, x = fixed(power), normal(6, 3, 6, 6, dtype=torch.float64)
    groups = groups_of(model, x)
    assert free(groups) == {"0": 8, "3": 6} and unsafe_groups(model, list(groups.values())[:2], x) == {}
    graph = trace(model, x)
    riders = list(find_riders(graph, groups["0"], graph.nodes))
    assert [set(rider.tensors) for rider in riders] == ([{"1.bias", "1.mean"}] if power == 1 else [])
    assert (ends_elsewhere(graph, groups["0"]) is None) == (power == 1)
    batch = x, torch.arange(6) % 4
    for criterion in ("integrated_gradient", "loss_change"):
        actual, expected = (way(model, batch, "0", criterion=criterion) for way in (singe.score, reference.score))
        assert torch.allclose(actual, expected, rtol=1e-7, atol=0)


def test_a_shift_that_is_reached_along_many_ways_is_computed_once():
    def wiring(self, x):
        shift = self.table.weight[0]
        for _ in range(60):
            shift = shift + shift.sin()
        return self.b(self.a(x) + shift)

    model = Wired(wiring, a=nn.Linear(3, 6), b=nn.Linear(6, 2), table=nn.Embedding(1, 6))
    assert free(groups_of(model, normal(4, 3))) == {"a": 6}


def test_a_shift_may_be_computed_with_what_the_code_makes():
    def wiring(self, x):
        shift = self.table.weight[0]
        return self.b((self.a(x) + shift * torch.full((len(shift),), 2.0)).relu())

    model = Wired(wiring, a=nn.Linear(3, 6), b=nn.Linear(6, 2), table=nn.Embedding(1, 6)).double().eval()
    batch = normal(4, 3, dtype=torch.float64), torch.arange(4) % 2
    groups = groups_of(model, batch[0])
    assert free(groups) == {"a": 6} and unsafe_groups(model, [groups["a"]], batch[0]) == {}
    assert "table.weight" in {s.tensor for s in groups["a"].slices}
    actual, expected = (way(model, batch, "a") for way in (singe.score, reference.score))
    assert torch.allclose(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("criterion", ["integrated_gradient", "loss_change"])
def test_what_a_table_has_for_a_head_fades_with_it(criterion):
    model, x = randomised(BiasedAttention()).double().eval(), normal(3, 7, 5, dtype=torch.float64)

    def loss(outputs, batch):
        return (outputs - batch[1]).square().mean()

    batch = (x, normal(3, 7, 5, seed=4, dtype=torch.float64))
    actual, expected = (
        way(model, batch, "qkv", criterion=criterion, loss=loss) for way in (singe.score, reference.score)
    )
    assert len(actual) == 3 and torch.allclose(actual, expected, rtol=1e-9, atol=0)
