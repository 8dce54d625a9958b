import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import (
    DenseNet,
    DigitNet,
    ExciteNet,
    FlattenNet,
    MobileNet,
    OptionANet,
    PlainNet,
    PreActNet,
    ResNeXt,
    images,
    randomised,
)
from states import same, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from wiring import Wired, normal

import singe
from singe.graph.analysis import find_groups
from singe.graph.layer import find_layers
from singe.graph.trace import trace
from singe.memory import Memory
from singe.removal.surgery import mask
from singe.scoring.relevance import Propagation, RelevanceScorer, check_relevance, relevance_scores
from singe.task import Task

CRITERION = singe.FeatureRelevance()
MEMORY = 1 << 30


def double(model):
    return randomised(model).double().eval()


def through(model, x, start, at=0, alpha=2):
    """The relevance of the value of the operator number ``at``, where that of the logits is ``start``."""
    graph = trace(model, x)
    node = [n for n in graph.nodes if not graph.is_size(n)][at]
    _, found = Propagation(graph, [node], alpha)(graph.live(model), x, lambda _: start)
    return found[node]


class Same(nn.Module):
    """An operator that leaves its input as it is, so that relevance can be looked at there."""

    def forward(self, x):
        return F.leaky_relu(x, 1.0)


# -- rules -------------------------------------------------------------------------------------------------------


def test_two_layers_by_hand():
    model = nn.Sequential(Same(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1.0], [2.0, -0.5]]))
        model[3].weight.copy_(torch.tensor([[1.0, -1.0], [3.0, 1.0]]))
    x, start = torch.tensor([[1.0, 2.0]] * 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    # h = (3, 1). Class 0 has z = (3, -1): R_h = (2, -1). Class 1 has z = (9, 1), nothing inhibits: R_h = (.9, .1).
    # z_1 = (1, 2): a third and two thirds of R_h1. z_2 = (2, -1): 2 R_h2 and -R_h2.
    hidden = torch.tensor([[2.0, -1.0], [0.9, 0.1]], dtype=torch.float64)
    inputs = torch.tensor([[2 / 3 - 2, 4 / 3 + 1], [0.3 + 0.2, 0.6 - 0.1]], dtype=torch.float64)
    assert torch.allclose(through(model, x, start, at=1), hidden, atol=1e-6)
    assert torch.allclose(through(model, x, start), inputs, atol=1e-6)


def shares(z, kind, alpha):
    """How one output's relevance is divided by what its inputs contribute, z_i, one after the other."""
    excites, inhibits = sum(v for v in z if v > 0), -sum(v for v in z if v < 0)
    if kind == "magnitude":
        return [abs(v) / (excites + inhibits) for v in z]
    if not inhibits or not excites:
        return [abs(v) / (excites + inhibits) if v else 0.0 for v in z]
    return [alpha * v / excites if v > 0 else (alpha - 1) * v / inhibits for v in z]


def literal(function, x, relevance, kind, alpha=2):
    """The relevance of x [B, ...] by a loop over samples, outputs and inputs of a linear function without bias."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None]).flatten(), x[b])
        for j, row in enumerate(jacobian.flatten(1)):
            z = (row * x[b].flatten()).tolist()
            out[b] += torch.tensor(shares(z, kind, alpha), dtype=x.dtype).view_as(x[b]) * relevance[b, j]
    return out


WEIGHTED = {
    "linear": (nn.Linear(6, 4), (6,)),
    "convolution": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 4, 5)),
    "dilated": (nn.Conv2d(2, 2, 2, dilation=2, bias=False), (2, 4, 4)),
    "uneven": (nn.Conv1d(2, 2, 4, padding="same"), (2, 5)),
    "grouped": (nn.Conv2d(4, 6, 2, groups=2), (4, 3, 3)),
    "depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2, stride=2), (2, 2, 3)),
    "volume": (nn.Conv3d(1, 2, 2), (1, 2, 3, 3)),
}


@pytest.mark.parametrize("alpha", [1, 2])
@pytest.mark.parametrize("name", WEIGHTED)
def test_layers_with_weights_are_as_a_loop_has_it(name, alpha):
    layer, shape = WEIGHTED[name]
    model = double(nn.Sequential(Same(), layer, nn.Flatten()))
    x, bare = normal(2, *shape, dtype=torch.float64), copy.deepcopy(layer)
    bare.bias = None
    start = normal(*model(x).shape, seed=4, dtype=torch.float64)
    assert torch.allclose(through(model, x, start, alpha=alpha), literal(bare, x, start, "signed", alpha))


def test_a_batch_norm_counts_as_a_factor_of_the_layer_before_it():
    model = double(nn.Sequential(Same(), nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Flatten()))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([0.5, -1.0, -0.3, 2.0]))
    x = normal(2, 2, 3, 3, dtype=torch.float64)
    start, scale = normal(2, 16, seed=4, dtype=torch.float64), model[2].weight / (model[2].running_var + 1e-5).sqrt()
    weight = (model[1].weight * scale[:, None, None, None]).detach()
    assert torch.allclose(through(model, x, start), literal(lambda v: F.conv2d(v, weight), x, start, "signed"))


MEANS = {
    "average pooling": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive average pooling": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(3),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("name", MEANS)
def test_means_are_as_a_loop_has_it(name):
    def wiring(_, x):
        return MEANS[name](F.leaky_relu(x, 1.0)).flatten(1)

    model, x = Wired(wiring, unused=nn.Linear(1, 1)), normal(2, 2, 4, 5, dtype=torch.float64)
    start = normal(*model(x).shape, seed=4, dtype=torch.float64)
    assert torch.allclose(through(model, x, start), literal(MEANS[name], x, start, "magnitude"))


def test_max_pooling_gives_all_to_the_winner():
    model, x = nn.Sequential(Same(), nn.MaxPool2d(2), nn.Flatten()).eval(), normal(2, 2, 4, 4)
    _, index = F.max_pool2d(x, 2, return_indices=True)
    start = normal(2, 8, seed=4)
    expected = torch.zeros(2, 2, 16).scatter_(2, index.flatten(2), start.view(2, 2, 4)).view_as(x)
    assert torch.equal(through(model, x, start), expected)


def test_a_pooling_that_tells_places_too_gives_all_to_the_winner():
    class Told(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.leaky_relu(x, 1.0), 2, return_indices=True)[0].flatten(1)

    x, start = normal(2, 2, 4, 4), normal(2, 8, seed=4)
    plain = nn.Sequential(Same(), nn.MaxPool2d(2), nn.Flatten()).eval()
    assert torch.equal(through(Told().eval(), x, start), through(plain, x, start))


def test_a_sum_is_divided_by_the_magnitudes_of_its_terms():
    def wiring(_, x):
        a, b = F.leaky_relu(x, 1.0).chunk(2, 1)
        return a + b

    x = torch.tensor([[3.0, -1.0, 0.0, 1.0, 3.0, 0.0], [2.0, 2.0, 5.0, -2.0, 0.0, 1.0]])
    found = through(Wired(wiring, unused=nn.Linear(1, 1)), x, torch.ones(2, 3))
    expected = torch.tensor([[0.75, 0.25, 0.5, 0.25, 0.75, 0.5], [0.5, 1.0, 5 / 6, 0.5, 0.0, 1 / 6]])
    assert torch.allclose(found, expected)


def test_what_is_added_to_itself_or_to_a_parameter_gets_all():
    def wiring(m, x):
        x = F.leaky_relu(x, 1.0)
        return x + x + m.linear.bias

    model, start = Wired(wiring, linear=nn.Linear(1, 4)), normal(2, 4, seed=4)
    assert torch.allclose(through(model, normal(2, 4), start), start)


def test_what_is_put_together_is_taken_apart():
    def wiring(_, x):
        x = F.leaky_relu(x, 1.0)
        return torch.cat([x[:, :2].flip(1), F.pad(x[:, 2:], (1, 1))], 1)

    found = through(Wired(wiring, unused=nn.Linear(1, 1)), normal(2, 3), torch.arange(10.0).view(2, 5))
    assert torch.equal(found, torch.tensor([[1.0, 0.0, 3.0], [6.0, 5.0, 8.0]]))


# -- conservation ------------------------------------------------------------------------------------------------

NETS = [PlainNet, FlattenNet, PreActNet, MobileNet, ResNeXt, DigitNet, OptionANet, DenseNet]


def without_bias(model):
    """Nothing is added anywhere, so that no relevance can end."""
    for module in randomised(model).modules():
        if isinstance(module, _NormBase):
            nn.init.zeros_(module.running_mean)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("kind", NETS)
def test_relevance_that_enters_the_first_layer_is_what_the_logits_were_given(kind):
    model, channels = without_bias(kind()), 1 if kind is DigitNet else 3
    graph = trace(model, images(channels=channels)[0])
    first = next(layer for group in find_groups(graph) for layer in find_layers(graph, group)).output
    for seed, (dtype, tolerance) in enumerate([(torch.float32, 1e-4), (torch.float64, 1e-9)] * 2):
        x, y = images(5, channels=channels, seed=seed)  # some networks take as many as they were traced with
        x, model = x.to(dtype), model.to(dtype)
        logits, found = Propagation(graph, [first])(graph.live(model), x, lambda v, y=y: F.one_hot(y, v.shape[1]).to(v))
        assert torch.allclose(logits, model(x), rtol=1e-4, atol=1e-6)
        per_sample = found[first].flatten(1).sum(1)
        assert torch.allclose(per_sample, torch.ones_like(per_sample), atol=tolerance)


@settings(max_examples=4)
@given(st.integers(4, 6), st.integers(1, 5), st.integers(0, 99))
def test_every_layer_of_a_stack_gets_as_much(width, depth, seed):
    torch.manual_seed(seed)
    layers = [nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU()) for _ in range(depth)]
    model = nn.Sequential(Same(), *layers, nn.Linear(width, 3, bias=False)).double().eval()
    x = normal(3, width, seed=seed, dtype=torch.float64)
    graph = trace(model, x)
    _, found = Propagation(graph, graph.nodes)(graph.live(model), x, lambda logits: torch.ones_like(logits))
    alive = [bool((model[: i + 1](x) > 0).any(1).all()) for i in range(1, depth + 1)]
    if all(alive):  # else there is nothing that relevance could go to
        assert all(torch.allclose(r.sum(1), torch.full((3,), 3.0).double()) for r in found.values())


def test_what_nothing_contributes_to_keeps_nothing_and_divides_by_nothing():
    model = nn.Sequential(Same(), nn.Linear(2, 2)).eval()
    assert not through(model, torch.zeros(2, 2), torch.ones(2, 2)).any()


# -- scores ------------------------------------------------------------------------------------------------------


def by_definition(model, x, y, layer):
    """The scores of the channels of one layer, class by class."""
    graph = trace(model, x)
    node = next(i for g in find_groups(graph) for i in find_layers(graph, g) if i.weight == f"{layer}.weight").output
    logits, found = Propagation(graph, [node])(graph.live(model), x, lambda v: F.one_hot(y, v.shape[1]).to(v))
    right = logits.argmax(1) == y
    accuracy = {c: right[y == c].double().mean().item() for c in y.unique().tolist()}
    total = 0
    for c, share in accuracy.items():
        weight = 1.0 if share == 0 else torch.sigmoid(torch.tensor(max(accuracy.values()) / share)).item()
        total = total + weight * found[node][y == c].flatten(2).mean(2).mean(0) / len(accuracy)
    return total.abs() / total.norm()


@pytest.fixture(scope="module")
def setting():
    model = double(PlainNet())
    x, _ = images(20)
    y = model(x.double()).argmax(1)
    y[::3] = (y[::3] + 1) % 4
    return model, x.double(), y


def test_scores_are_those_of_the_definition(setting):
    model, x, y = setting
    found = singe.score(model, (x, y), "features.4", criterion="feature_relevance")
    assert torch.allclose(found, by_definition(model, x, y, "features.4"))


def test_where_nothing_is_right_all_classes_weigh_alike(setting):
    model, x, _ = setting
    y = (model(x).argmax(1) + 1) % 4
    found = singe.score(model, (x, y), "features.0", criterion=CRITERION)
    assert torch.allclose(found, by_definition(model, x, y, "features.0"))


def test_samples_pass_in_parts_where_memory_is_short(setting):
    model, x, y = setting
    graph = trace(model, x)
    groups = find_groups(graph)
    whole, parted = (
        relevance_scores(model, graph, groups, (x[:7], y[:7]), Task(), CRITERION, Memory("it", memory, x.device))
        for memory in (MEMORY, 1)
    )
    assert all(map(torch.allclose, whole, parted))


def test_fewer_samples_pass_where_the_device_has_no_room(setting, monkeypatch, caplog):
    model, x, y = setting
    graph = trace(model, x)
    group = find_groups(graph)[0]
    expected = RelevanceScorer(model, graph, group, (x, y), Task(), MEMORY).scores(CRITERION)
    call = Propagation.__call__

    def short(self, live, inputs, start):
        if len(inputs) > 3:
            raise torch.OutOfMemoryError("no room")
        return call(self, live, inputs, start)

    monkeypatch.setattr(Propagation, "__call__", short)
    scorer = RelevanceScorer(model, graph, group, (x, y), Task(), MEMORY)
    assert torch.allclose(scorer.scores(CRITERION), expected, rtol=1e-9)
    assert scorer.memory < MEMORY and f"{group.name}: out of memory" in caplog.text


def test_a_coupled_neuron_scores_the_sum_over_its_layers():
    model = double(DigitNet())
    x, y = images(12, channels=1)
    found = singe.score(model, (x.double(), y), "stem", criterion=CRITERION)
    layers = [by_definition(model, x.double(), y, name) for name in ("stem", "blocks.0.conv2")]
    assert torch.allclose(found, sum(layers))


def test_half_precision_scores_as_single_does():
    model, (x, y) = randomised(PlainNet()), images(16)
    full = singe.score(model, (x, y), "features.4", criterion=CRITERION)
    half = singe.score(model.bfloat16(), (x.bfloat16(), y), "features.4", criterion=CRITERION)
    assert torch.allclose(half, full, atol=0.05)


def test_the_scorer_follows_what_is_masked(setting):
    model, x, y = copy.deepcopy(setting[0]), *setting[1:]
    graph = trace(model, x)
    group = find_groups(graph)[1]
    scorer = RelevanceScorer(model, graph, group, (x, y), Task(), MEMORY)
    before = scorer.scores(CRITERION)
    mask(model, group.slices, torch.tensor([2]))
    scorer.forget(2)
    after = scorer.scores(CRITERION)
    assert before[2] > 0
    assert after[2] == 0
    assert torch.equal(scorer.scores(CRITERION, torch.tensor([4, 1])), after[[4, 1]])
    assert not scorer.lasting(CRITERION)


def test_pruning_by_relevance_removes_the_least_relevant_first():
    model, batch = randomised(PlainNet()), images(16)
    before = snapshot(model)
    result = singe.prune(
        model,
        [batch],
        0.3,
        criterion="feature_relevance",
        finetune=None,
        images=16,
        progress=False,
        allocation="global",
    )
    assert same(snapshot(model), before)
    record = result.history[0]
    first = singe.score(model, batch, record.group, criterion="feature_relevance")
    assert record.removed[0] == int(first.argmin())
    assert record.scores[0] == pytest.approx(float(first.min()), rel=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------


def test_an_operator_without_a_rule_is_named_with_its_place():
    model, x = randomised(ExciteNet()), images(4)[0]
    graph = trace(model, x)
    with pytest.raises(ValueError, match=r"aten\.mul\.Tensor"):
        check_relevance(graph, find_groups(graph))


def test_pruning_refuses_an_operator_without_a_rule_before_any_work():
    with pytest.raises(ValueError, match=r"expected operators that relevance has a rule for, got .*aten"):
        singe.prune(randomised(ExciteNet()), [images()], 0.3, criterion=CRITERION, images=5, progress=False)


@pytest.mark.parametrize(
    ("wiring", "named"),
    [
        (lambda m, x: m.a(x) * m.b(x), r"aten\.mul\.Tensor"),
        (lambda m, x: m.b(m.a(x).softmax(1)), r"aten\.softmax\.int"),
        (lambda m, x: F.linear(m.a(x), m.b(x).T @ m.b(x)), r"aten\.linear"),
        (lambda m, x: torch.add(m.a(x), m.b(x), alpha=2), r"aten\.add\.Tensor"),
    ],
)
def test_what_has_no_rule(wiring, named):
    model, x = Wired(wiring, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), normal(3, 4)
    graph = trace(model, x)
    with pytest.raises(ValueError, match=named):
        Propagation(graph, [n for n in graph.nodes if n.target is torch.ops.aten.linear.default][:1])


@pytest.mark.parametrize("output", [lambda y: (y, y + 1), lambda y: y[:, :, None]])
def test_a_network_without_logits_is_refused(output):
    model, x = Wired(lambda m, x: output(m.a(x)), a=nn.Linear(4, 4)), normal(3, 4)
    graph = trace(model, x)
    with pytest.raises(ValueError, match=r"logits \[B, classes\]"):
        Propagation(graph, graph.nodes[:1])


@pytest.mark.parametrize(
    ("y", "error", "said"),
    [
        (torch.rand(5, 4).softmax(1), TypeError, "class indices y"),
        (torch.ones(5, dtype=torch.bool), TypeError, r"torch\.bool"),
        (torch.zeros(5, 2, dtype=torch.int64), ValueError, r"\(5, 2\)"),
        (torch.full((5,), 4), ValueError, r"\[0, 4\)"),
        (torch.full((5,), -1), ValueError, r"\[0, 4\)"),
    ],
)
def test_labels_that_are_no_class_indices_are_refused(y, error, said):
    model, loss = randomised(PlainNet()), lambda outputs, batch: outputs.square().mean()
    with pytest.raises(error, match=said):
        singe.score(model, (images()[0], y), "features.0", criterion=CRITERION, loss=loss)


def test_batches_of_another_form_are_refused():
    x, y = images()
    with pytest.raises(TypeError, match=r"batches \(x, y\)"):
        singe.score(
            randomised(PlainNet()), {"x": x, "y": y}, "features.0", criterion=CRITERION,
            forward=lambda model, batch: model(batch["x"]), loss=lambda o, b: F.cross_entropy(o, b["y"]),
        )  # fmt: skip


def test_relevance_that_overflows_is_refused():
    model, (x, y) = randomised(PlainNet()), images()
    with torch.no_grad():
        model.features[0].weight.fill_(1e38)
    with pytest.raises(ValueError, match="finite"):
        singe.score(model, (x, y), "features.0", criterion=CRITERION)


def test_there_is_no_literal_version():
    with pytest.raises(ValueError, match="FeatureRelevance"):
        singe.reference.score(randomised(PlainNet()), images(), "features.0", criterion=CRITERION)
