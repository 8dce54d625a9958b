"""What scoring leaves as it was, what it refuses, and networks that the reference has to meet with care."""

import copy
import logging
import math
import random

import numpy as np
import pytest
import torch
from networks import (
    MLP,
    DigitNet,
    PlainNet,
    ResNeXt,
    images,
    randomised,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F
from wiring import normal

import singe
from singe import reference


def snapshot(model):
    return (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def same(a, b):
    def equal(u, v):
        return torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v

    return (
        a[0].keys() == b[0].keys()
        and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
        and a[1:3] == b[1:3]
        and all(equal(u, v) for u, v in zip(a[3], b[3], strict=True))
    )


def test_model_batch_and_random_state_are_left_alone_whatever_mode_the_model_is_in():
    model, (x, y) = randomised(PlainNet()), images()
    expected = singe.score(model, (x, y), "features.0")
    F.cross_entropy(model(x), y).backward()
    model.train()
    model.features[1].eval()
    model.classifier[0].requires_grad_(False)
    before, kept = snapshot(model), (x.clone(), y.clone())
    state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with torch.no_grad():
        actual = singe.score(model, (x.requires_grad_(), y), "features.0")
        assert not torch.is_grad_enabled()
    assert torch.equal(actual, expected)  # eval mode, whatever the model is in; no gradients needed outside
    assert same(snapshot(model), before)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1]) and x.grad is None
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1]) and random.getstate() == state[2]


@pytest.mark.parametrize("criterion", ["magnitude", "reconstruction", "feature_relevance"])
def test_all_layers_are_scored_at_once_as_one_by_one(criterion, one_export, caplog):
    model, batch = randomised(ResNeXt()), images(8)
    with caplog.at_level(logging.INFO, "singe"):
        scores = singe.score(model, batch, criterion=criterion)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    if criterion == "reconstruction":
        layers.remove("head")
        assert "head is not scored: no reader can be refitted" in caplog.text
    assert sorted(scores) == sorted(layers)
    for name, found in scores.items():
        assert torch.equal(found, singe.score(model, batch, name, criterion=criterion)), name


@pytest.mark.parametrize("layer", ["features.99", "conv", "", 3])
def test_an_unknown_layer_is_named(layer):
    match = "neurons" if layer == "" else rf"PlainNet, got {layer!r}"
    with pytest.raises((ValueError, TypeError), match=match):
        singe.score(randomised(PlainNet()), images(), layer)


@pytest.mark.parametrize("layer", ["features.2", "features", "features.3"])
def test_a_layer_without_neurons_is_named(layer):
    with pytest.raises(ValueError, match=f"neurons.*'{layer}'"):
        singe.score(randomised(PlainNet()), images(), layer)


def test_bad_input_is_refused_with_what_came():
    model, (x, y) = randomised(PlainNet()), images()
    for kind, match, arguments in [
        (TypeError, "Module", ("model", (x, y))),
        (TypeError, r"\(x, y\)", (model, x)),
        (ValueError, "NaN", (model, (x * math.nan, y))),
        (ValueError, r"PlainNet.*\(5, 8, 8\)", (model, (x[:, 0], y))),
        (ValueError, "length", (model, (x, y[:2]))),
        (ValueError, "label|class|Target", (model, (x, y + 4))),
    ]:
        with pytest.raises(kind, match=match):
            singe.score(*arguments, "features.0")
    with pytest.raises(ValueError, match="taylor"):
        singe.score(model, (x, y), "features.0", criterion="taylor")
    with pytest.raises(ValueError, match="memory"):
        singe.score(model, (x, y), "features.0", memory=0)
    model.features[4].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"features\.4\.weight"):
        singe.score(model, (x, y), "features.0")


class ComputedWeights(nn.Module):
    """Behind the scored layer, a batch norm follows a convolution whose weight is computed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3)
        self.computed, self.bn = nn.utils.parametrizations.weight_norm(nn.Conv2d(5, 6, 3)), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.computed(F.relu(self.first(x))))).mean((2, 3)))


def test_batch_norm_behind_a_computed_weight_is_not_folded_into_it(one_export):
    model = randomised(ComputedWeights()).double()
    x, y = images()
    scores = singe.score(model, (x.double(), y), "first")
    expected = reference.score(model, (x.double(), y), "first")
    assert (scores - expected).norm() <= 1e-9 * expected.norm()


def test_batch_norm_of_another_dtype_is_left_unfolded():
    model = randomised(DigitNet(4)).bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    x, y = images(channels=1)
    assert singe.score(model, (x.bfloat16(), y), "blocks.0.conv1").isfinite().all()


def test_the_layer_path_holds_one_nodes_gradient_at_a_time(monkeypatch):
    norm = torch.linalg.vector_norm
    shapes = []
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda g, *a, **k: shapes.append(g.shape) or norm(g, *a, **k))
    batch = torch.randn(6, 10), torch.randint(4, (6,))
    criterion = singe.IntegratedGradient(quadrature=singe.GaussLegendre(4), path="layer")
    singe.score(randomised(MLP()), batch, "layers.0", criterion=criterion)
    assert shapes.count((12, 10)) >= 4 and all(len(shape) == 2 for shape in shapes)


def test_tied_parameters_elsewhere_do_not_disturb_the_reference():
    model = randomised(MLP()).double()
    model.spare = nn.Linear(9, 4)
    model.spare.weight = model.layers[4].weight
    batch = torch.randn(6, 10).double(), torch.randint(4, (6,))
    torch.testing.assert_close(singe.score(model, batch, "layers.0"), reference.score(model, batch, "layers.0"))


def test_a_model_that_draws_in_eval_mode_is_refused_and_leaves_the_random_state_alone():
    model = randomised(PlainNet())
    model.features.append(nn.Dropout(0.3))
    model.features[-1].train = lambda mode=True: model.features[-1]
    model.features[-1].training = True
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="answer alike"):
        singe.score(model, images(), "features.0")
    assert torch.equal(torch.get_rng_state(), before)


def test_any_signature_that_takes_one_input_will_do():
    class Starred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = randomised(PlainNet())

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    expected = singe.score(randomised(PlainNet()), images(), "features.0")
    assert torch.equal(singe.score(Starred().eval(), images(), "inner.features.0"), expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_the_callers_inference_mode_and_autocast_change_nothing(mode):
    model = randomised(PlainNet())
    expected = singe.score(model, images(), "features.0")
    with mode():
        assert torch.equal(singe.score(model, images(), "features.0"), expected)


def test_masked_classes_with_infinite_logits_do_not_look_like_disagreement():
    class Masked(PlainNet):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, False, False, True]), -math.inf)

    model, (x, y) = randomised(Masked()), images(classes=3)
    options = {"criterion": "magnitude", "allocation": "uniform", "compensate": "none", "finetune": None}
    result = singe.prune(model, [(x, y)], 0.3, images=5, progress=False, **options)
    assert set(result.frozen) == {"classifier.3"}


class Detached(nn.Module):
    """What ``a`` computes reaches the outputs, but no gradient gets back to it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(10, 6), nn.Linear(6, 4), nn.Linear(10, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)).detach()) + self.c(x)


def test_neurons_that_no_gradient_reaches_score_zero(one_export):
    model, batch = randomised(Detached()), (normal(8, 10), torch.arange(8) % 4)
    for memory in (1 << 30, 400):
        for criterion in ("integrated_gradient", "magnitude_gradient"):
            scores = singe.score(model, batch, "a", criterion=criterion, memory=memory)
            assert scores.tolist() == [0] * 6, (criterion, memory)
        assert singe.score(model, batch, "a", criterion="loss_change", memory=memory).abs().min() > 0


class Aside(MLP):
    """With a second output that the loss does not look at."""

    def __init__(self):
        super().__init__()
        self.aux = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        return super().forward(x), self.aux(x)


def test_neurons_that_the_loss_does_not_depend_on_score_zero(one_export):
    model, batch = randomised(Aside()), (normal(8, 10), torch.arange(8) % 4)
    for memory in (1 << 30, 400):
        options = {"loss": lambda outputs, batch: F.cross_entropy(outputs[0], batch[1]), "memory": memory}
        assert singe.score(model, batch, "aux.0", **options).tolist() == [0] * 5
        assert singe.score(model, batch, "layers.0", **options).sum() > 0


DEAF = {
    "detached": (torch.detach, lambda outputs, batch: outputs.sum()),
    "steps": (lambda y: (y > 0).float(), lambda outputs, batch: outputs.mean()),
    "classes": (lambda y: y.argmax(1), lambda outputs, batch: outputs.float().mean()),
}


@pytest.mark.parametrize(("answer", "loss"), DEAF.values(), ids=DEAF.keys())
def test_a_network_without_gradients_is_refused_by_criteria_that_are_made_of_them(answer, loss):
    class Deaf(MLP):
        def forward(self, x):
            return answer(super().forward(x))

    model, batch = randomised(Deaf()), (normal(8, 10), torch.arange(8) % 4)
    message = "depends smoothly on the weights, got one without a gradient"
    with pytest.raises(ValueError, match=message):
        singe.score(model, batch, "layers.0", loss=loss)
    with pytest.raises(ValueError, match=message):
        singe.prune(model, [batch], 0.3, loss=loss, images=8, finetune=None, compensate="none", progress=False)
    assert singe.score(model, batch, "layers.0", loss=loss, criterion="loss_change").isfinite().all()


def test_a_network_that_is_not_trained_is_scored_all_the_same():
    model, batch = randomised(MLP()).requires_grad_(False), (normal(8, 10), torch.arange(8) % 4)
    assert torch.equal(singe.score(model, batch, "layers.0"), singe.score(randomised(MLP()), batch, "layers.0"))
    assert not any(p.requires_grad for p in model.parameters())
