import logging
import math
import threading
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
from networks import PlainNet, images, randomised
from pruning import learned, mlp, parameters, prune, random_states, same_plan, snapshot, vectors
from states import same
from terminal import Terminal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe import FineTune

# -- seeds and state ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_plan_and_weights_whatever_the_global_state():
    results = []
    for outer, seed in ((0, 4), (1, 4), (2, 5)):
        torch.manual_seed(outer)
        np.random.seed(outer)
        results.append(prune(mlp(), finetune=FineTune(steps=6, when="layer"), seed=seed, images=12))
    assert same_plan(results[0], results[1])
    assert same(results[0].model.state_dict(), results[1].model.state_dict())
    assert results[0].history[0].scores == results[1].history[0].scores
    assert results[2].history[0].scores != results[0].history[0].scores  # other images


def test_model_and_random_state_are_as_before_also_after_an_error():
    model, generator = mlp().train(), torch.Generator().manual_seed(2)
    loader, calls = vectors(generator=generator), []

    def loss(outputs, batch):
        calls.append(1)
        return F.cross_entropy(outputs, batch[1]) * (math.nan if outputs.requires_grad and len(calls) > 60 else 1)

    before = snapshot(model), random_states(generator)
    with pytest.raises(ValueError, match="finite"):
        prune(model, loader, loss=loss, finetune=FineTune(steps=100, when="layer"))
    assert len(calls) > 60  # in the middle of the run
    assert same((snapshot(model), random_states(generator)), before)


# -- what is left alone ------------------------------------------------------------------------------------------


def test_an_ignored_layer_stays_whole_and_is_reported():
    result = prune(mlp(), rho=0.2, ignore=["layers.0"])
    assert result.model.layers[0].out_features == 12
    assert result.frozen["layers.0"] == "ignored"
    assert [r.group for r in result.plan.removals] == ["layers.2"]
    with pytest.raises(TypeError, match=r"ignore.*'layers\.0'"):
        prune(mlp(), ignore="layers.0")
    with pytest.raises(ValueError, match="nothing"):
        prune(mlp(), ignore=["nothing"])


class Left(nn.Module):
    """What cannot be pruned: the output, weights that are computed and what they read, a layer of one neuron."""

    def __init__(self):
        super().__init__()
        self.first, self.computed = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.free, self.single, self.head = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 1, 1), nn.Linear(16, 4)

    def forward(self, x):
        y = F.relu(self.single(F.relu(self.free(F.relu(F.conv2d(F.relu(self.first(x)), self.computed.weight * 2))))))
        return self.head(y.flatten(1))


def test_what_cannot_be_pruned_is_reported_and_logged_with_the_reason(caplog):
    loader = DataLoader(TensorDataset(*images(20)), batch_size=10)
    with caplog.at_level(logging.INFO, "singe"):
        result = prune(randomised(Left()), loader, 0.02)
    assert set(result.frozen) == {"first", "computed", "single", "head"}
    for name, reason in (
        ("first", "is computed"),
        ("computed", "is computed"),
        ("single", "one neuron"),
        ("head", "output"),
    ):
        assert reason in result.frozen[name]
        messages = [r.getMessage() for r in caplog.records if r.name == "singe"]
        assert any(m.startswith(f"{name} ") and result.frozen[name] in m for m in messages)
    assert [r.group for r in result.plan.removals] == ["free"]


def test_a_weight_that_is_not_followed_freezes_no_other_of_its_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Module(), nn.Linear(6, 4)
            self.inner.weight = nn.Parameter(torch.randn(6, 10))
            self.inner.scale = nn.Parameter(torch.randn(1, 4))

        def forward(self, x):
            return self.head(F.linear(x, self.inner.weight).relu()) * self.inner.scale

    result = prune(Both(), rho=0.3)
    assert [r.group for r in result.history] == ["inner"] and "inner" not in result.frozen


def test_a_collapsed_network_is_called_one_and_a_sound_one_is_not(caplog):
    model = learned(mlp())
    with caplog.at_level(logging.WARNING, "singe"):
        prune(model, rho=0.1)
        assert not caplog.records
        result = prune(model, rho=0.92, criterion=singe.Magnitude())
    assert result.loss_after > math.log(4)  # worse than guessing
    assert "collapsed" in caplog.text


def test_an_untrained_network_that_loses_nothing_is_not_called_collapsed(caplog):
    with caplog.at_level(logging.WARNING, "singe"):
        result = prune(mlp(), rho=1e-6)
    assert result.loss_after == result.loss_before
    assert [r.getMessage() for r in caplog.records] == [
        "nothing is removed: rho=1e-06 is less than half of the smallest step"
    ]


def test_nothing_is_printed_without_progress_and_a_bar_goes_to_stderr_where_that_is_a_terminal(capfd):
    prune(mlp(), finetune=FineTune(steps=2, when="layer"), progress=False)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    prune(mlp(), progress=True)
    assert capfd.readouterr() == ("", "")  # stderr is no terminal
    with redirect_stderr(Terminal()) as terminal:
        prune(mlp(), progress=True)
    assert "group" in terminal.getvalue() and capfd.readouterr() == ("", "")


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"rho": 0}, ValueError, r"rho in \(0, 1\), got 0"),
        ({"rho": 1.0}, ValueError, r"rho in \(0, 1\), got 1"),
        ({"rho": -0.1}, ValueError, "rho"),
        ({"rho": math.nan}, ValueError, "rho"),
        ({"rho": "0.5"}, TypeError, r"rho.*str"),
        ({"rho": True}, TypeError, r"rho.*bool"),
        ({"criterion": "taylor"}, ValueError, "taylor"),
        ({"allocation": "even"}, ValueError, r"uniform.*'even'"),
        ({"refresh": "eager"}, ValueError, r"lazy.*'eager'"),
        ({"finetune": 100}, TypeError, r"FineTune.*int"),
        ({"images": 0}, ValueError, "images"),
        ({"images": 6.0}, TypeError, "images"),
        ({"memory": -1}, ValueError, "memory"),
        ({"seed": "zero"}, TypeError, "seed"),
        ({"checkpoint": ""}, ValueError, "a path for checkpoint, got an empty string"),
        ({"checkpoint": 3}, TypeError, "a path for checkpoint, got int"),
        ({"model": "mlp"}, TypeError, "Module"),
        ({"model": nn.ReLU()}, ValueError, "parameters"),
        ({"model": nn.Linear(10, 4)}, ValueError, r"neurons to prune.*output"),
        ({"loader": None}, TypeError, "iterable"),
        ({"loader": []}, ValueError, "empty"),
        ({"loader": (b for b in vectors())}, TypeError, "one-shot"),
        ({"loader": [torch.ones(20, 10)]}, TypeError, r"\(x, y\)"),
        ({"loader": [{"x": 1, "y": 2}]}, TypeError, r"\(x, y\).*dict"),
        ({"loader": [(torch.ones(20, 10) * math.nan, torch.zeros(20, dtype=torch.int64))]}, ValueError, "NaN"),
        ({"loader": [(torch.ones(20, 9), torch.zeros(20, dtype=torch.int64))]}, ValueError, r"MLP.*\(20, 9\)"),
        ({"loader": [(torch.ones(20, 10), torch.full((20,), 4))]}, ValueError, r"label|class|Target"),
        ({"loss": lambda o, b: o.sum() * math.nan}, ValueError, r"finite loss.*nan"),
        ({"loss": lambda o, b: 1.0}, TypeError, r"loss.*float"),
        ({"loss": lambda o, b: o}, ValueError, r"scalar.*\(20, 4\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_was_expected_and_what_came(options, kind, match):
    options = {"model": mlp(), "loader": vectors(), "rho": 0.3, "images": 20, "finetune": None, **options}
    with pytest.raises(kind, match=match):
        singe.prune(options.pop("model"), options.pop("loader"), options.pop("rho"), progress=False, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(value):
    model = mlp()
    model.layers[2].bias.data[1] = value
    with pytest.raises(ValueError, match=r"layers\.2\.bias"):
        prune(model)


def test_a_rho_out_of_reach_says_how_far_it_goes():
    reach = 1 - (10 + 1 + 1 + 1 + 4 + 4) / parameters(mlp())  # one neuron in each hidden layer
    with pytest.raises(ValueError, match=rf"rho <= {reach:.4f}.*got 0\.97"):
        prune(mlp(), rho=0.97)
    assert prune(mlp(), rho=math.floor(reach * 1e4) / 1e4).params_removed == pytest.approx(reach, abs=1e-3)


def test_images_that_turn_bad_later_are_refused_too():
    class Loader:
        def __init__(self):
            self.epochs = 0

        def __iter__(self):
            self.epochs += 1
            x = torch.ones(20, 10) * (math.nan if self.epochs > 1 else 1)
            return iter([(x, torch.arange(20) % 4)])

    with pytest.raises(ValueError, match="NaN"):
        prune(mlp(), Loader())


def test_a_loader_that_does_not_shuffle_is_warned_about_unless_it_is_a_list_of_what_to_measure_on(caplog):
    x, y = images(8)
    data = TensorDataset(x, y)
    arguments = {"rho": 0.2, "images": 8, "progress": False}
    sorted_, shuffled, chosen = (DataLoader(data, 4), DataLoader(data, 4, shuffle=True), [(x, y)])
    between = FineTune(1, when="layer")
    for loader, finetune, warned, again in [
        (sorted_, None, True, False), (sorted_, FineTune(1), True, False), (sorted_, between, True, True),
        (shuffled, between, False, False), (chosen, None, False, False), (chosen, FineTune(1), True, False),
    ]:  # fmt: skip
        caplog.clear()
        singe.prune(randomised(PlainNet()), loader, finetune=finetune, **arguments)
        assert ("does not shuffle" in caplog.text, "again and again" in caplog.text) == (warned, again)


def small(**arguments):
    x, y = images(8)
    defaults = {"rho": 0.2, "images": 8, "progress": False, "finetune": FineTune(2), "criterion": "magnitude"}
    defaults |= {"allocation": "uniform", "compensate": "none"}
    loader = arguments.pop("loader", [(x, y)] * 3)
    model = arguments.pop("model", None) or randomised(PlainNet())
    return singe.prune(model, loader, **{**defaults, **arguments})


def test_nothing_of_the_callers_gets_a_gradient():
    teacher = randomised(PlainNet(), seed=5)
    x, y = images(8)
    x.requires_grad_()
    small(model=teacher, loader=[(x, y)] * 2, loss=lambda out, batch: F.mse_loss(out, teacher(batch[0])))
    assert x.grad is None and all(p.grad is None for p in teacher.parameters())


def test_batch_norm_in_eval_mode_inside_a_model_in_train_mode_is_not_trained():
    model = randomised(PlainNet()).train()
    model.features[1].eval()
    result = small(model=model, ignore=["features.0"])
    assert torch.equal(result.model.features[1].running_mean, model.features[1].running_mean)
    again = small(model=randomised(PlainNet()).train(), ignore=["features.0"])
    assert not torch.equal(again.model.features[1].running_mean, model.features[1].running_mean)


def test_generators_of_nested_samplers_are_seeded_and_given_back():
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(*images(32))
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    loader = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(sampler, 8, False))
    before = generator.get_state()
    first, second = small(loader=loader), small(loader=loader)
    assert torch.equal(generator.get_state(), before)
    assert first.loss_before == second.loss_before and first.plan == second.plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": nn.CrossEntropyLoss()}, r"lambda outputs, batch: loss\(outputs, batch\[1\]\)"),
        ({"loss": "mse"}, "loss to be a function, got str"),
        ({"loss": lambda out, batch: out.detach().sum()}, "can be trained"),
        ({"loss": lambda out, batch: out.sum().to(torch.complex64)}, "real number"),
        ({"criterion": singe.IntegratedGradient}, "the class IntegratedGradient"),
        ({"seed": 2**70}, "seed"),
        ({"ignore": None}, "ignore"),
        ({"ignore": [1]}, "ignore"),
        ({"allocation": ["uniform"]}, "allocation"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
def test_more_bad_input_is_refused_with_words(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        small(**arguments)


def test_a_model_that_cannot_be_copied_or_trained_on_the_loaders_batches_is_refused():
    model = randomised(PlainNet())
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        small(model=model)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match="can be trained, in train mode, on batches"):
        small(model=flat, loader=[tuple(t[:1] for t in images())] * 8)


def test_numpys_numbers_will_do_for_rho():
    assert small(rho=np.float32(0.2)).plan == small(rho=float(np.float32(0.2))).plan
