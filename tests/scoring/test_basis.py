import pytest
import torch
from networks import Experts
from torch import nn
from torch.nn import functional as F

import singe
from singe import reference
from singe.graph.analysis import find_groups
from singe.graph.layer import find_layers
from singe.graph.trace import trace
from singe.scoring.basis import Bases
from singe.scoring.engine import Engine


class Tokens(nn.Module):
    """A linear layer on [B, T, 40], then on what is left of the tokens."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(40, 30), nn.Linear(30, 4)

    def forward(self, x):
        return self.second(F.gelu(self.first(x))).mean(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tokens().double().eval()


def drawn(batch, tokens):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, 40, generator=generator, dtype=torch.float64), torch.arange(batch) % 4


def layer_of(model, x):
    graph = trace(model, x)
    return find_layers(graph, next(g for g in find_groups(graph) if g.name == "first"))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_as_long_as_before(model, dtype):
    x, _ = drawn(5, 3)
    layer, inputs = layer_of(model, x), x.movedim(-1, 1).to(dtype)
    reduced = Bases().reduced(layer, inputs, norms=1000)
    assert reduced.shape == (5, 15, 3) and reduced.dtype == torch.promote_types(dtype, torch.float32)
    delta = torch.randn(7, 5, 3, dtype=torch.float64)
    lengths = [torch.einsum("kbt,bct->kc", delta, inputs_.double()).norm(dim=1) for inputs_ in (inputs, reduced)]
    torch.testing.assert_close(*lengths, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)


@pytest.mark.parametrize(("tokens", "norms"), [(5, 1000), (3, 20)], ids=["many rows", "few norms"])
def test_inputs_stay_where_little_is_saved(model, tokens, norms):
    x, _ = drawn(5, tokens)
    inputs = x.movedim(-1, 1)
    assert Bases().reduced(layer_of(model, x), inputs, norms) is inputs


def test_convolutions_keep_their_inputs():
    model, x = nn.Sequential(nn.Conv2d(40, 30, 1), nn.Flatten(), nn.Linear(30, 4)), torch.randn(3, 40, 1, 1)
    graph = trace(model.eval(), x)
    (layer,) = find_layers(graph, next(g for g in find_groups(graph) if g.name == "0"))
    assert Bases().reduced(layer, x, norms=1000) is x


@pytest.mark.parametrize("p", [1, 2, float("inf")])
@pytest.mark.parametrize("criterion", [singe.IntegratedGradient, singe.SummedGradient])
def test_scores_are_those_of_the_reference(model, criterion, p, monkeypatch):
    batch, widths, reduced = drawn(4, 3), [], Bases.reduced

    def seen(self, layer, x, norms):
        found = reduced(self, layer, x, norms)
        widths.append((x.shape[1], found.shape[1]))
        return found

    monkeypatch.setattr(Bases, "reduced", seen)
    graph = trace(model, batch[0])
    group = next(g for g in find_groups(graph) if g.name == "first")
    wanted = criterion(p)
    found = Engine(model, graph, group, batch).scores(wanted)
    assert set(widths) == ({(40, 12)} if p == 2 else set())
    torch.testing.assert_close(found, reference.score(model, batch, "first", criterion=wanted), rtol=1e-9, atol=0)


class Coupled(nn.Module):
    """Two layers that lose the same neurons; what the second reads depends on them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 4)

    def forward(self, x):
        h = self.a(x)
        return self.c((h + self.b(h.tanh())).relu())


@pytest.mark.parametrize("memory", [1 << 30, 60_000, 20_000])
def test_inputs_that_change_from_pass_to_pass_stay_as_they_are(memory):
    torch.manual_seed(2)
    model = Coupled().double().eval()
    batch = torch.randn(2, 60, dtype=torch.float64), torch.tensor([1, 3])
    graph = trace(model, batch[0])
    group = next(g for g in find_groups(graph) if g.name == "a")
    found = Engine(model, graph, group, batch, memory=memory).scores(singe.IntegratedGradient())
    torch.testing.assert_close(found, reference.score(model, batch, "a").cpu(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("memory", [1 << 30, 1])
def test_an_expert_that_no_sample_reaches_scores_nothing(number, memory):
    model, x = Experts().double(), torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch, graph = (x, torch.arange(5) % 4), trace(model, x)
    group = next(g for g in find_groups(graph) if g.name == f"experts.{number}.0")
    found = Engine(model, graph, group, batch, memory=memory).scores(singe.IntegratedGradient())
    expected = reference.score(model, batch, group.name).cpu()
    assert bool(expected.any()) == (number != 2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
