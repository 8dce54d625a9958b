import logging
import math

import pytest
import torch
from networks import DenseNet, ExciteNet, MobileNet, PlainNet, ResNeXt, images, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

import singe
from singe import reference
from singe.criteria import resolve_elementwise
from singe.graph.trace import trace
from singe.graph.weights import find_weights
from singe.scoring import elementwise
from singe.scoring.elementwise import Gradients, WeightScorer
from singe.task import Task

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
ROOM = 1 << 30


class Ranks(nn.Module):
    """Transposed, grouped and transposed, in one and three dimensions, dilated, and a weight used twice and tied."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1)
        self.grouped = nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2)
        self.one, self.norm = nn.Conv1d(6, 4, 5, stride=7, padding="valid"), nn.BatchNorm1d(4)
        self.three = nn.Conv3d(1, 4, (4, 3, 1), padding=(0, 1, 0))
        self.twice, self.tied, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.tied.weight = self.twice.weight

    def forward(self, x):
        x = F.gelu(self.grouped(F.relu(self.up(x)))).flatten(2)
        x = self.three(F.relu(self.norm(self.one(x)))[:, None, :, :, None]).mean((2, 3, 4))
        return self.head(self.tied(F.relu(self.twice(F.relu(self.twice(x))))))


def prepared(model, dtype=torch.float64, count=5):
    x, y = images(count)
    model, batch = randomised(model).to(dtype), (x.to(dtype), y)
    return model, trace(model, batch[0]), batch


def scores(model, graph, batch, name, criterion, memory=ROOM, **options):
    scorer = WeightScorer(model, graph, name, batch, Task(**options), memory)
    return scorer.scores(resolve_elementwise(criterion))


def error(actual, expected):
    return float((actual.double() - expected).abs().max() / expected.abs().max())


CRITERIA = [
    "magnitude", "gradient", "magnitude_gradient", "summed_gradient", "integrated_gradient",
    singe.IntegratedGradient(p=1, quadrature=singe.Geometric(0.6), path="layer"),
    singe.SummedGradient(p=math.inf, quadrature=singe.Geometric(0.5, steps=3), path="layer"),
]  # fmt: skip


@pytest.mark.parametrize("make", [PlainNet, MobileNet, ResNeXt, ExciteNet, DenseNet, Ranks])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_scores_equal_the_reference(make, dtype):
    model, graph, batch = prepared(make(), dtype)
    for weight in find_weights(graph, model).prunable:
        for criterion in CRITERIA:
            expected = reference.weight_scores(model, batch, weight.name, criterion=criterion)
            actual = scores(model, graph, batch, weight.name, criterion)
            assert actual.shape == model.get_parameter(weight.name).shape
            assert error(actual, expected) <= TOLERANCE[dtype], (weight, criterion)


def test_the_papers_sum_literally():
    model, graph, batch = prepared(PlainNet())
    name, mu = "features.4.weight", 0.7
    weight, expected = model.get_parameter(name), 0
    for s in range(14):  # 0.7 ** 13 < 0.01
        faded = PlainNet().to(torch.float64).eval()
        faded.load_state_dict(model.state_dict())
        own = faded.get_parameter(name)
        with torch.no_grad():
            own.mul_(mu**s)
        (gradient,) = torch.autograd.grad(F.cross_entropy(faded(batch[0]), batch[1]), own)
        expected = expected + (own * gradient).abs().detach()
    criterion = singe.IntegratedGradient(quadrature=singe.Geometric(mu), path="layer")
    assert error(scores(model, graph, batch, name, criterion), expected) <= 1e-12
    assert weight.requires_grad and weight.grad is None


@pytest.mark.parametrize("criterion", ["integrated_gradient", "magnitude_gradient"])
def test_folding_batch_norms_changes_no_product_of_weight_and_gradient(criterion):
    model, graph, batch = prepared(PlainNet())
    before = scores(model, graph, batch, "features.0.weight", criterion)
    reference.fold(model, graph)
    after = scores(model, trace(model, batch[0]), batch, "features.0.weight", criterion)
    assert error(after, before) <= 1e-9
    assert not torch.allclose(model.features[0].weight, randomised(PlainNet()).features[0].weight.double())


@pytest.mark.parametrize("memory", [1, 20_000, 60_000])
def test_images_in_parts_give_the_same(memory):
    model, graph, batch = prepared(DenseNet())
    name = "first.weight"
    assert len(Gradients(model, graph, name, batch, Task(), memory)._sizes) > 1
    whole = scores(model, graph, batch, name, "integrated_gradient")
    assert error(scores(model, graph, batch, name, "integrated_gradient", memory), whole) <= 1e-12


def test_samples_that_see_each_other_stay_together(caplog):
    model = Wired(lambda m, x: m.b(F.relu(m.a(x) - m.a(x).mean(0))), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    batch = normal(7, 5), torch.arange(7) % 4
    graph = trace(model, batch[0])
    whole = scores(model, graph, batch, "a.weight", "integrated_gradient")
    with caplog.at_level(logging.WARNING, "singe"):
        assert torch.equal(scores(model, graph, batch, "a.weight", "integrated_gradient", 1), whole)
    assert "a.weight: samples cannot be passed in parts" in caplog.text


def test_passes_get_smaller_where_the_device_has_no_room(monkeypatch, caplog):
    model, graph, batch = prepared(PlainNet())
    expected, summed = scores(model, graph, batch, "features.0.weight", "gradient"), Gradients.summed

    def short(self, nodes):
        if len(self._sizes) == 1:
            raise torch.OutOfMemoryError("no room")
        return summed(self, nodes)

    monkeypatch.setattr(elementwise.Gradients, "summed", short)
    scorer = WeightScorer(model, graph, "features.0.weight", batch, Task(), ROOM)
    assert error(scorer.scores(singe.Gradient()), expected) <= 1e-12
    assert scorer.memory < ROOM and "out of memory" in caplog.text


def test_a_loss_that_writes_into_the_outputs_and_outputs_of_any_nesting():
    def loss(outputs, batch):
        outputs["y"][0].mul_(2)
        return F.cross_entropy(outputs["y"][0], batch[1]) + outputs["first"].pow(2).mean()

    def wiring(m, x):
        y = m.a(x)
        return {"first": y, "y": [m.b(F.relu(y))], "size": 3}

    model = Wired(wiring, a=nn.Linear(5, 6), b=nn.Linear(6, 4)).double()
    batch = normal(7, 5, dtype=torch.float64), torch.arange(7) % 4
    graph = trace(model, batch[0])
    for name in ("a.weight", "b.weight"):
        expected = reference.weight_scores(model, batch, name, loss=loss)
        for memory in (ROOM, 1):
            assert error(scores(model, graph, batch, name, "integrated_gradient", memory, loss=loss), expected) <= 1e-9


def test_chance_is_seeded_and_has_no_order():
    model, graph, batch = prepared(PlainNet())
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(scores(model, graph, batch, "features.0.weight", "random"))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_scores_that_are_not_finite_are_refused():
    model, graph, batch = prepared(PlainNet())
    with pytest.raises(ValueError, match=r"scores of features\.0\.weight are not finite"):
        scores(model, graph, batch, "features.0.weight", "gradient", loss=lambda o, b: o.sum() * math.inf)


def test_names_mean_the_path_of_the_layer_and_objects_have_to_say_so():
    assert resolve_elementwise("integrated_gradient") == singe.IntegratedGradient(path="layer")
    assert resolve_elementwise("summed_gradient") == singe.SummedGradient(path="layer")
    assert resolve_elementwise(singe.Gradient(p=1)) == singe.Gradient(p=1)
    with pytest.raises(ValueError, match=r"expected path='layer' .*IntegratedGradient\(.*path='neuron'\)"):
        resolve_elementwise(singe.IntegratedGradient())
    for criterion in ("loss_change", "reconstruction", singe.LossChange()):
        with pytest.raises(ValueError, match="scores single weights"):
            resolve_elementwise(criterion)
    with pytest.raises(TypeError, match="name, or an object"):
        resolve_elementwise(3)
