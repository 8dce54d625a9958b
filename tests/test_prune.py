import copy
import itertools
import logging
import math
import random
import sys
import threading
from contextlib import redirect_stderr

import numpy as np
import pytest
import torch
from networks import MLP, DigitNet, MobileNet, PlainNet, images, randomised
from states import same
from terminal import Terminal
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe import FineTune, demo, reference
from singe.cost import mac_cost
from singe.data import Stream
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.isolation import preserved_random_state
from singe.plan import Plan
from singe.result import count_macs
from singe.surgery import compact, mask
from singe.trial import expanded

CRITERIA = ["magnitude", "gradient", "magnitude_gradient", "summed_gradient", "integrated_gradient", "loss_change"]


def vectors(count=40, **options):
    """A shuffling loader over vectors in four clusters."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(count) % 4
    x = torch.randn(4, 10, generator=generator)[y] * 2 + torch.randn(count, 10, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, **options)


def prune(model, loader=None, rho=0.3, **options):
    """``singe.prune``, small, quiet and plain."""
    plain = {"allocation": "uniform", "compensate": "none", "finetune": None, "images": 20, "progress": False}
    options = {**plain, **options}
    return singe.prune(model, vectors() if loader is None else loader, rho, **options)


def mlp(seed=0):
    return randomised(MLP(), seed)


def learned(model, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x, y = vectors().dataset.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def random_states(generator):
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate(),
        generator.get_state().tolist(),
    )  # fmt: skip


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def same_plan(a, b):
    return [(r.group, r.neurons) for r in a.plan.removals] == [(r.group, r.neurons) for r in b.plan.removals]


# -- one run of a residual network, looked at from all sides -----------------------------------------------------


class Run:
    """A DigitNet in a mixed state, pruned by 40 % with fine-tuning."""

    def __init__(self):
        self.model = randomised(DigitNet(4))
        self.x, self.y = images(40, channels=1)
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.model.train()
        self.model.blocks[0].bn1.eval()
        self.model.blocks[1].conv1.requires_grad_(False)
        generator = torch.Generator().manual_seed(11)
        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=16, shuffle=True, generator=generator)
        self.before = snapshot(self.model), random_states(generator)
        self.result = prune(self.model, loader, 0.4, finetune=FineTune(steps=8, when="layer"), images=24, seed=3)
        self.after = snapshot(self.model), random_states(generator)


@pytest.fixture(scope="module")
def run():
    return Run()


def test_the_users_model_and_every_random_generator_are_as_before(run):
    assert same(run.after, run.before)


def test_the_result_is_of_the_same_class_and_in_the_same_state(run):
    model = run.result.model
    assert type(model) is DigitNet
    assert [m.training for m in model.modules()] == run.before[0][1]
    assert [p.requires_grad for p in model.parameters()] == run.before[0][2]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in run.model.named_parameters()]


def test_the_result_trains_and_brings_no_gradients_along(run):
    model = copy.deepcopy(run.result.model)
    assert all(p.grad is None for p in model.parameters())
    loss = F.cross_entropy(model(run.x), run.y)
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert F.cross_entropy(model(run.x), run.y) < loss


def test_rho_is_met_within_the_smallest_neuron_that_is_left(run):
    result, model = run.result, run.result.model
    assert result.params_before == parameters(run.model)
    assert result.params_after == parameters(model)
    assert result.params_removed == pytest.approx(1 - parameters(model) / parameters(run.model))
    units = []
    for group in find_groups(trace(copy.deepcopy(model).eval(), run.x)):
        if group.size > 1 and group.frozen is None:
            smaller, plan = copy.deepcopy(model), Plan()
            plan.add(group, [0])
            compact(smaller, plan.removed())
            units.append(parameters(model) - parameters(smaller))
    assert abs(result.params_removed - 0.4) <= min(units) / parameters(run.model)


def test_the_pruned_network_is_the_masked_one(run):
    result = run.result
    masked = expanded(run.model, result.model, result.plan)
    assert parameters(masked) == parameters(run.model)
    with torch.no_grad():
        actual, expected = copy.deepcopy(result.model).eval()(run.x), masked(run.x)
    assert float((actual - expected).norm() / expected.norm()) < 1e-4


def test_losses_and_multiply_adds_are_those_of_the_two_networks(run):
    result = run.result
    assert result.macs_after < result.macs_before
    assert result.macs_removed == 1 - result.macs_after / result.macs_before
    dense = sum(m.weight.numel() * s for m, s in macs_of(copy.deepcopy(result.model).eval(), run.x[:1]))
    assert result.macs_after == dense
    assert result.loss_before > 0 and math.isfinite(result.loss_after)
    assert result.loss_before != result.loss_after


def macs_of(model, x):
    """(module, positions its weights are applied at) for every convolution and linear layer."""
    seen, hooks = [], []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hooks.append(module.register_forward_hook(lambda m, _, y: seen.append((m, y[0, 0].numel()))))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_the_history_tells_of_every_group_in_the_plan_in_order(run):
    result = run.result
    assert [(r.group, r.removed, r.size) for r in result.history] == [
        (r.group, r.neurons, r.size) for r in result.plan.removals
    ]
    order = [g.name for g in find_groups(trace(randomised(DigitNet(4)), run.x))]
    groups = [r.group for r in result.history]
    assert groups == [name for name in order if name in groups]
    assert len(groups) > 3 and not set(groups) & result.frozen.keys()
    for record in result.history:
        assert 0 < len(record.removed) < record.size
        assert len(record.scores) == len(record.removed) == len(set(record.removed))
        assert record.size + len(record.removed) - 1 <= record.neurons_scored
        assert record.neurons_scored <= sum(record.size - i for i in range(len(record.removed)))
        assert all(math.isfinite(s) and s >= 0 for s in record.scores)
        assert all(math.isfinite(v) for v in (record.loss_start, record.loss_removed, record.loss_end))
        assert record.loss_removed != record.loss_end  # it was tuned
        assert record.seconds_scoring > 0 and record.seconds_tuning > 0
        assert expected_width(run, record) == record.size - len(record.removed)


def expected_width(run, record):
    return run.result.model.get_submodule(record.group).weight.shape[0]


def test_a_saved_result_loads_into_a_fresh_network(run, tmp_path):
    run.result.save(tmp_path / "pruned")
    loaded = singe.load(DigitNet(4).eval(), tmp_path / "pruned")
    assert same(loaded.state_dict(), run.result.model.state_dict())
    assert torch.equal(loaded(run.x), copy.deepcopy(run.result.model).eval()(run.x))
    assert not loaded.training


def test_the_summary_names_what_was_left_whole(run):
    assert run.result.frozen == {"head": "network output"}
    text = str(run.result)
    for part in (f"{run.result.params_before:,}", f"{run.result.params_after:,}", "head", "network output"):
        assert part in text


# -- the algorithm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [singe.IntegratedGradient(quadrature=singe.GaussLegendre(2)), singe.LossChange()])
def test_full_without_tuning_is_algorithm_1_written_out_on_the_reference(criterion):
    model, loader = mlp().double(), vectors()
    loader.dataset.tensors = loader.dataset.tensors[0].double(), loader.dataset.tensors[1]
    result = prune(model, loader, 0.3, criterion=criterion, refresh="full", seed=5)
    work, stream = copy.deepcopy(model), Stream(loader, torch.device("cpu"))
    state = torch.get_rng_state()
    for index, (removal, record) in enumerate(zip(result.plan.removals, result.history, strict=True)):
        stream.restart((5 << 20) + index)
        batch = stream.take(20)
        group = next(g for g in find_groups(trace(work, batch[0])) if g.name == removal.group)
        gone = []
        for score in record.scores:
            scores = reference.score(work, batch, removal.group, criterion=criterion)
            scores[gone] = math.inf
            gone.append(int(scores.argmin()))
            assert score == pytest.approx(float(scores.min()), rel=1e-6, abs=1e-12)
            mask(work, group.slices, torch.tensor(gone[-1:]))
        assert list(removal.neurons) == gone
    torch.set_rng_state(state)
    assert len(result.plan.removals) == 2


def test_lazy_scores_fewer_neurons_than_full_for_nearly_the_same_plan():
    full, lazy = (prune(learned(mlp()), rho=0.4, refresh=refresh) for refresh in ("full", "lazy"))
    scored = [sum(r.neurons_scored for r in result.history) for result in (full, lazy)]
    assert scored[1] < scored[0]
    assert scored[0] == sum(sum(r.size - i for i in range(len(r.removed))) for r in full.history)
    for a, b in zip(full.plan.removals, lazy.plan.removals, strict=True):
        assert len(set(a.neurons) & set(b.neurons)) >= len(a.neurons) - 1


def test_every_criterion_by_name_or_object_prunes_other_neurons_to_the_same_widths():
    model, shapes, plans = learned(mlp()), set(), set()
    for criterion in [*CRITERIA, singe.IntegratedGradient(p=1, path="layer"), singe.Magnitude(math.inf)]:
        result = prune(model, criterion=criterion)
        shapes.add(tuple(p.shape for p in result.model.parameters()))
        plans.add(tuple(tuple(sorted(r.neurons)) for r in result.plan.removals))
    assert len(shapes) == 1
    assert len(plans) > 2


@pytest.mark.parametrize("when", ["layer", "neuron", "after"])
@pytest.mark.parametrize("refresh", ["lazy", "full"])
def test_all_steps_are_taken_whenever_the_tuning_is(when, refresh):
    steps, tuned = [], FineTune(steps=7, when=when)
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        result = prune(mlp(), rho=0.4, finetune=tuned, refresh=refresh, criterion="loss_change")
    finally:
        hook.remove()
    assert len(steps) == 7
    changed = [abs(r.loss_end - r.loss_removed) > 1e-5 for r in result.history]
    assert len(changed) == 2
    assert all(changed) if when == "layer" else not any(changed)


def test_tuning_after_every_neuron_keeps_what_is_masked_out():
    result = prune(mlp(), finetune=FineTune(steps=20, when="neuron", lr=0.1))
    masked = expanded(mlp(), result.model, result.plan)
    x = vectors().dataset.tensors[0]
    assert torch.allclose(masked(x), result.model(x), atol=1e-4)
    assert sum(len(r.neurons) for r in result.plan.removals) > 4


def test_parameters_that_require_no_gradient_are_cut_but_not_trained():
    model = mlp()
    model.layers[2].requires_grad_(False)
    result = prune(model, finetune=FineTune(steps=10, when="layer", lr=0.1))
    masked = expanded(model, result.model, result.plan)
    kept = masked.layers[2].weight != 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(masked.layers[2].weight[kept], model.layers[2].weight[kept])
    assert not torch.equal(masked.layers[4].weight, model.layers[4].weight)


def test_tuning_helps():
    model, loader = learned(mlp()), vectors()
    plain, tuned = (prune(model, loader, 0.6, finetune=f) for f in (None, FineTune(steps=60, when="layer", lr=0.05)))
    assert tuned.loss_after < plain.loss_after


def test_a_loss_of_several_outputs_is_passed_through():
    class Pair(MLP):
        def forward(self, x):
            return {"logits": self.layers(x), "norm": x.square().mean(1)}

    seen = []

    def loss(outputs, batch):
        seen.append(outputs["norm"].shape)
        return F.cross_entropy(outputs["logits"], batch[1]) + outputs["norm"].mean()

    result = prune(randomised(Pair()), loss=loss, finetune=FineTune(steps=8, when="layer"))
    assert type(result.model) is Pair
    assert result.params_removed > 0.2
    assert torch.Size([20]) in seen and torch.Size([16]) in seen  # scored and tuned with it


def test_a_model_that_fixes_its_batch_size_is_pruned():
    class Fixed(MLP):
        def forward(self, x):
            return self.layers(x).reshape(20, 4)

    loader = DataLoader(vectors().dataset, batch_size=20)
    result = prune(randomised(Fixed()), loader, 0.3, finetune=FineTune(steps=2, when="layer"))
    assert result.params_removed == pytest.approx(0.3, abs=0.05)


def test_pruning_works_inside_no_grad():
    with torch.no_grad():
        inside = prune(mlp(), finetune=FineTune(steps=2, when="layer"))
        assert not torch.is_grad_enabled()
    outside = prune(mlp(), finetune=FineTune(steps=2, when="layer"))
    assert same_plan(inside, outside)


def test_a_rho_below_the_smallest_neuron_removes_at_most_one():
    result = prune(mlp(), rho=1e-6)
    assert result.plan.removals == [] and result.history == []
    assert same(result.model.state_dict(), mlp().state_dict())


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
        ({"criterion": None}, TypeError, "criterion"),
        ({"allocation": "even"}, ValueError, r"uniform.*'even'"),
        ({"refresh": "eager"}, ValueError, r"lazy.*'eager'"),
        ({"finetune": 100}, TypeError, r"FineTune.*int"),
        ({"images": 0}, ValueError, "images"),
        ({"images": 6.0}, TypeError, "images"),
        ({"memory": -1}, ValueError, "memory"),
        ({"seed": "zero"}, TypeError, "seed"),
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


def test_a_loader_that_does_not_shuffle_is_warned_about_when_it_is_trained_on(caplog):
    x, y = images(8)
    data = TensorDataset(x, y)
    arguments = {"rho": 0.2, "images": 8, "progress": False}
    for shuffle, finetune, warned in [(False, None, False), (True, FineTune(1), False), (False, FineTune(1), True)]:
        caplog.clear()
        loader = DataLoader(data, batch_size=4, shuffle=shuffle)
        singe.prune(randomised(PlainNet()), loader, finetune=finetune, **arguments)
        assert any("shuffle" in r.message for r in caplog.records) == warned


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
    with pytest.raises(ValueError, match="can be trained on batches"):
        small(model=flat, loader=[tuple(t[:1] for t in images())] * 8)


def test_numpys_numbers_will_do_for_rho():
    assert small(rho=np.float32(0.2)).plan == small(rho=float(np.float32(0.2))).plan


# -- targets and allocations -------------------------------------------------------------------------------------


def deep(*widths):
    """Linear layers "0", "2", "4", ... with activations between, for ``vectors``."""
    layers = [part for a, b in itertools.pairwise((10, *widths, 4)) for part in (nn.Linear(a, b), nn.ReLU())]
    return randomised(nn.Sequential(*layers[:-1]))


def shares(result):
    """{group: the share of its neurons that is gone} for every group that lost any."""
    return {r.group: len(r.removed) / r.size for r in result.history}


@pytest.mark.parametrize(("make", "rho"), [(PlainNet, 0.35), (MobileNet, 0.5)])
def test_a_share_of_the_multiply_adds_goes_and_no_neuron_more_or_less_comes_closer(make, rho):
    model, (x, y) = randomised(make()), images(8)
    result = prune(model, [(x, y)], rho, target="macs", criterion="magnitude", images=8)
    assert (count_macs(model, x), count_macs(result.model, x)) == (result.macs_before, result.macs_after)
    graph, lost = trace(model, x), {r.group: len(r.removed) for r in result.history}
    groups = [g for g in find_groups(graph) if g.name not in result.frozen]
    cost, removed = mac_cost(model, groups, graph, result.macs_before), [lost.get(g.name, 0) for g in groups]
    gap = abs(rho * result.macs_before - cost.gone(removed))
    assert gap / result.macs_before == pytest.approx(abs(result.macs_removed - rho)) and gap < 0.02 * result.macs_before
    for i, group in enumerate(groups):
        for n in {removed[i] - 1, removed[i] + 1} & set(range(group.size)):
            other = [n if i == j else r for j, r in enumerate(removed)]
            assert abs(rho * result.macs_before - cost.gone(other)) >= gap
    assert abs(result.params_removed - rho) > 2 * abs(result.macs_removed - rho)


def test_a_share_of_the_multiply_adds_out_of_reach_says_how_far_it_goes():
    model = mlp()
    reach = 1 - (10 + 1 + 4) / (120 + 108 + 36)
    with pytest.raises(ValueError, match=rf"rho <= {math.floor(reach * 1e4) / 1e4}.*got 0\.95"):
        prune(model, rho=0.95, target="macs", criterion="magnitude")


@pytest.mark.parametrize("allocation", ["uniform", "block", "global", "sensitivity", {"layers.0": 3}])
def test_a_share_of_the_latency_goes_as_measured_before_and_behind(allocation, measured):
    model = mlp()
    result = prune(model, rho=0.5, target="latency", criterion="magnitude", allocation=allocation)
    assert result.latency.before.median == pytest.approx(1e-6 * parameters(model))
    assert result.latency.after.median == pytest.approx(1e-6 * parameters(result.model))
    assert result.latency.removed == pytest.approx(result.params_removed)
    assert 0.5 <= result.latency.removed <= 0.56  # a neuron of the first group is more than two percent
    assert measured[-1] == 2


def test_a_share_of_the_latency_out_of_reach_says_how_far_it_goes(measured):
    with pytest.raises(ValueError, match=r"expected rho <= 0\.\d+, which takes all that may go, got 0\.99"):
        prune(mlp(), rho=0.99, target="latency", criterion="magnitude")


def test_latency_is_measured_on_as_many_samples_as_asked_for_and_the_model_is_left_alone(monkeypatch, measured):
    seen, latencies = [], sys.modules["singe.result"].latencies

    def noted(models, example, **options):
        seen.append((len(example), [m.training for m in models]))
        assert models[0] is not model
        return latencies(models, example, **options)

    for name in ("singe.result", "singe.latency_budget"):
        monkeypatch.setattr(sys.modules[name], "latencies", noted)
    model = mlp().train()
    before = snapshot(model)
    result = prune(model, rho=0.4, target="latency", criterion="magnitude", latency_batch=7)
    assert {size for size, _ in seen} == {7} and result.latency.samples == 7
    assert same(snapshot(model), before) and result.model.training


def test_a_real_clock_will_do():
    wide = nn.Sequential(nn.Linear(10, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 5))
    result = prune(wide, rho=0.01, target="latency", criterion="magnitude", round_to=256)
    assert result.latency.before.median > 0 and result.latency.samples == 1


def test_other_targets_measure_what_came_of_it_alone(measured):
    result = prune(mlp(), criterion="magnitude", latency_batch=3)
    assert measured == [2] and result.latency.samples != 3


def test_linear_takes_larger_shares_from_later_groups():
    result = prune(deep(20, 20, 20, 20), rho=0.4, allocation="linear", criterion="magnitude")
    taken = shares(result)
    assert list(taken) == ["0", "2", "4", "6"]
    assert all(later == pytest.approx((i + 1) * taken["0"], abs=1.5 * (i + 2) / 20)
               for i, later in enumerate(taken.values()))  # fmt: skip
    assert list(taken.values()) == sorted(set(taken.values()))


def test_block_takes_the_same_share_within_a_block_and_more_from_later_ones():
    loader = [images(8, channels=1)]
    taken = shares(prune(randomised(DigitNet(8)), loader, 0.6, allocation="block", criterion="magnitude", images=8))
    stem, first, *rest = taken.values()
    assert list(taken) == ["stem", "blocks.0.conv1", *(f"blocks.{i}.conv{j}" for i in (1, 2) for j in (1, 2))]
    assert 0 < stem < first < min(rest[:2]) and max(rest[:2]) < min(rest[2:])
    assert rest[0] == pytest.approx(rest[1], abs=1 / 16) and rest[2] == pytest.approx(rest[3], abs=1 / 32)


def test_a_mapping_says_how_much_more_or_less_a_layer_loses():
    mapping = {"*": 1, "[246]": 3, "4": 0.5, "6": 0}
    result = prune(deep(40, 40, 40, 40), rho=0.25, allocation=mapping, criterion="magnitude")
    taken = shares(result)
    assert taken == {"0": taken["0"], "2": pytest.approx(3 * taken["0"], abs=0.06),
                     "4": pytest.approx(0.5 * taken["0"], abs=0.06)}  # fmt: skip
    assert result.params_removed == pytest.approx(0.25, abs=0.01)
    assert result.model[6].out_features == 40
    assert result.frozen == {"6": "the allocation gives it no share", "8": "network output"}
    for nothing in ({"*": 0}, {"0": 0, "2": 0.0}):
        with pytest.raises(ValueError, match=r"neurons to prune.*0: the allocation gives it no share"):
            prune(deep(5, 5), allocation=nothing)


def test_a_rate_for_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"allocation, got 'layers\.1\.conv'"):
        prune(mlp(), allocation={"layers.1.conv": 2})


@pytest.mark.parametrize("target", ["params", "macs"])
def test_global_is_the_ranking_of_first_scores_for_what_a_neuron_saves(target):
    model, loader = learned(deep(24, 16, 12), 20), vectors()
    result = prune(model, loader, 0.5, allocation="global", target=target, seed=5)
    with preserved_random_state(loader):
        stream = Stream(loader, torch.device("cpu"))
        stream.restart(5 << 20)
        batch = stream.take(20)  # as for the first group
    bias = target == "params"
    saved = {"0": 10 + 16 + bias, "2": 24 + 12 + bias, "4": 16 + 4 + bias}
    every = sorted((float(s) / unit, name) for name, unit in saved.items() for s in singe.score(model, batch, name))
    lost = [{name: sum(n == name for _, n in every[:k]) for name in saved} for k in range(len(every) + 1)]
    ours = {r.group: len(r.removed) for r in result.history}
    assert any(all(abs(ours.get(n, 0) - counts[n]) <= 1 for n in counts) for counts in lost)
    uniform = prune(model, loader, 0.5, target=target, criterion="magnitude")
    assert {r.group: len(r.removed) for r in uniform.history} not in lost  # the ranking says something
    assert (result.params_removed if bias else result.macs_removed) == pytest.approx(0.5, abs=0.02)


def test_round_to_leaves_multiples_in_every_layer_that_loses_any():
    result = prune(deep(24, 20, 7, 16, 8), rho=0.4, round_to=8, criterion="magnitude")
    widths = {r.group: r.size - len(r.removed) for r in result.history}
    assert widths.keys() == {"0", "2", "6"}
    assert set(widths.values()) <= {8, 16}
    assert [m.out_features for m in result.model[::2]] == [widths["0"], widths["2"], 7, widths["6"], 8, 4]
    assert result.frozen == {"4": "has no more than round_to=8 rows", "8": "has no more than round_to=8 rows",
                             "10": "network output"}  # fmt: skip
    with pytest.raises(ValueError, match=r"neurons to prune.*has no more than round_to=32 rows"):
        prune(mlp(), round_to=32)


class Unequal(nn.Module):
    """A neuron is four rows of one layer, by a pixel shuffle, and one of the other."""

    def __init__(self):
        super().__init__()
        self.up, self.side, self.head = nn.Conv2d(3, 48, 3), nn.Conv2d(3, 12, 3), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(F.relu(F.pixel_shuffle(self.up(x), 2)).mean((2, 3)) + self.side(x).mean((2, 3)))


@pytest.mark.parametrize("rho", [0.1, 0.25, 0.5])
def test_round_to_holds_for_every_layer_of_a_group(rho):
    result = prune(randomised(Unequal()), [images(8)], rho, round_to=4, criterion="magnitude", images=8)
    assert [m.out_channels % 4 for m in (result.model.up, result.model.side)] == [0, 0]


@pytest.mark.parametrize(
    "options", [{"target": "macs"}, {"allocation": "global"}, {"round_to": 4, "rho": 0.02}], ids=str
)
def test_a_rho_too_small_for_anything_is_warned_about(options, caplog):
    with caplog.at_level(logging.WARNING, "singe"):
        result = prune(mlp(), **{"rho": 1e-6, "criterion": "magnitude", **options})
    assert result.plan.removals == [] and result.params_after == result.params_before
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["nothing is removed"]


class Untouched:
    """A loader that is not to be read."""

    def __iter__(self):
        pytest.fail("the loader was read")


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"rho": 1.5}, ValueError, r"rho in \(0, 1\), got 1\.5"),
        ({"target": "flops"}, ValueError, "target 'params', 'macs' or 'latency', got 'flops'"),
        ({"target": None}, ValueError, "target 'params', 'macs' or 'latency', got None"),
        ({"allocation": "even"}, ValueError, "got 'even'"),
        ({"allocation": {"layers.0": -1}}, ValueError, r"got -1 for 'layers\.0'"),
        ({"allocation": {"layers.0": math.nan}}, ValueError, r"got nan for 'layers\.0'"),
        ({"allocation": {"layers.0": True}}, TypeError, r"allocation\['layers\.0'\], got bool"),
        ({"allocation": {1: 1}}, TypeError, "module names as keys of allocation, got 1"),
        ({"round_to": 0}, ValueError, "round_to >= 1, got 0"),
        ({"round_to": 8.0}, TypeError, "int for round_to, got float"),
        ({"recalibrate_bn": -1}, ValueError, "recalibrate_bn >= 0, got -1"),
        ({"recalibrate_bn": True}, TypeError, "int for recalibrate_bn, got bool"),
        ({"criterion": "taylor"}, ValueError, "taylor"),
        ({"refresh": "eager"}, ValueError, "eager"),
        ({"finetune": 100}, TypeError, "FineTune"),
        ({"images": 0}, ValueError, "images >= 1, got 0"),
        ({"memory": 0}, ValueError, "memory >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed >= 0, got -1"),
        ({"ignore": "head"}, TypeError, "ignore"),
        ({"loss": "mse"}, TypeError, "loss to be a function, got str"),
        ({"forward": 3}, TypeError, "forward to be a function, got int"),
        ({"model": nn.Linear(2, 2, dtype=torch.complex64)}, ValueError, "complex64"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_loader_is_read(options, kind, match):
    options = {"model": mlp(), "loader": Untouched(), **options}
    with pytest.raises(kind, match=match):
        prune(options.pop("model"), options.pop("loader"), **options)


# -- batch norm statistics estimated anew ------------------------------------------------------------------------


def normed():
    layers = [nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 9), nn.BatchNorm1d(9)]
    return randomised(nn.Sequential(*layers, nn.ReLU(), nn.Linear(9, 4)))


def statistics(model):
    return {n: (m.running_mean, m.running_var) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}


@pytest.mark.parametrize("finetune", [None, FineTune(3, when="after")], ids=["untuned", "tuned"])
def test_statistics_are_those_of_the_final_network(finetune):
    model, (x, y) = normed().train(), next(iter(vectors()))
    result = prune(model, [(x, y)], images=16, finetune=finetune, recalibrate_bn=1, criterion="magnitude")
    final = copy.deepcopy(result.model).eval().requires_grad_(False)
    assert result.loss_after == pytest.approx(float(F.cross_entropy(final(x), y)), rel=1e-5)
    assert all(m.training for m in result.model.modules())
    assert [result.model[i].momentum for i in (1, 5)] == [0.1, 0.1]
    for i in (1, 5):  # the second norm sees what the first one makes of the batch's own statistics
        seen, here = final[:i](x), statistics(result.model)[str(i)]
        torch.testing.assert_close(here, (seen.mean(0), seen.var(0)), rtol=1e-4, atol=1e-5)
        final[i].running_var.copy_(seen.var(0, correction=0))


def test_the_same_seed_gives_the_same_statistics_and_another_seed_others():
    results = [prune(normed(), recalibrate_bn=16, seed=s, criterion="magnitude") for s in (1, 1, 2)]
    assert same_plan(results[0], results[1]) and same_plan(results[0], results[2])
    first, again, other = (statistics(r.model) for r in results)
    assert same(first, again)
    assert not same(first, other)


def test_batch_norms_that_are_frozen_keep_their_statistics():
    model = normed().train()
    model[1].eval()
    options = {"recalibrate_bn": 20, "criterion": "magnitude", "ignore": ["0", "4"]}
    with pytest.raises(ValueError, match="neurons to prune"):
        prune(model, **options)
    result = prune(model, **{**options, "ignore": ["0"]})
    kept = [i for i in range(9) if i not in result.plan.removals[0].neurons]
    assert same(statistics(result.model)["1"], statistics(model)["1"])
    assert not torch.isclose(result.model[5].running_mean, model[5].running_mean[kept]).any()
    assert not result.model[1].training and result.model[5].training


def test_a_network_in_eval_mode_is_recalibrated_whole():
    model = normed()
    result = prune(model, recalibrate_bn=20, criterion="magnitude", ignore=["0"])
    assert not torch.isclose(result.model[1].running_mean, model[1].running_mean).any()
    assert not any(m.training for m in result.model.modules())


def test_without_batch_norm_recalibration_is_warned_about_and_without_recalibration_nothing_is(caplog):
    with caplog.at_level(logging.WARNING, "singe"):
        prune(learned(mlp()), rho=0.1, criterion="magnitude", recalibrate_bn=0)
        assert not caplog.records
        prune(learned(mlp()), rho=0.1, criterion="magnitude", recalibrate_bn=5)
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["recalibrate_bn changes nothing"]


def test_recalibration_makes_a_pruned_network_better_without_training(trained, digit_data):
    loader = DataLoader(digit_data[0], batch_size=64, shuffle=True)
    options = {"rho": 0.4, "criterion": "magnitude", "finetune": None, "progress": False}
    options |= {"allocation": "uniform", "compensate": "none"}
    plain, better = (singe.prune(trained, loader, recalibrate_bn=n, **options) for n in (0, 512))
    assert same_plan(plain, better)
    assert better.loss_after < 0.8 * plain.loss_after
    assert demo.accuracy(better.model, digit_data[1]) > demo.accuracy(plain.model, digit_data[1])


def test_a_last_batch_of_one_image_does_not_stop_recalibration_at_the_end_of_a_run():
    data = vectors(count=33).dataset
    result = prune(normed(), DataLoader(data, batch_size=16), recalibrate_bn=33, criterion="magnitude")
    assert all(t.isfinite().all() for pair in statistics(result.model).values() for t in pair)


# -- who watches a run -------------------------------------------------------------------------------------------


class Watched:
    """An MLP pruned twice alike, once with somebody who watches and draws at random."""

    def __init__(self):
        self.told, self.judged = [], []
        options = {"finetune": FineTune(steps=6), "seed": 5}
        self.plain = prune(mlp(), **options)
        self.result = prune(mlp(), **options, evaluate=self.evaluate, callbacks=[self.told.append, self.draw])

    def evaluate(self, model):
        self.draw()
        self.judged.append(parameters(model))
        return float(len(self.judged))

    def draw(self, record=None):
        torch.rand(3), np.random.rand(), random.random()


@pytest.fixture(scope="module")
def watched():
    return Watched()


def test_nothing_moves_because_somebody_watches(watched):
    assert same_plan(watched.result, watched.plain)
    assert same(watched.result.model.state_dict(), watched.plain.model.state_dict())
    assert (
        watched.plain.evaluation_before is watched.plain.evaluation_after is watched.plain.history[0].evaluation is None
    )


def test_the_network_is_evaluated_before_between_and_behind(watched):
    result = watched.result
    evaluations = [result.evaluation_before, *(r.evaluation for r in result.history), result.evaluation_after]
    assert evaluations == list(range(1, len(result.history) + 3))
    assert watched.judged[0] == result.params_before and watched.judged[-2:] == [result.params_after] * 2
    assert watched.judged == sorted(watched.judged, reverse=True)


def test_every_record_is_handed_over(watched):
    assert len(watched.told) == 2 and all(a is b for a, b in zip(watched.told, watched.result.history, strict=True))


def test_a_run_says_what_decided_it_and_what_took_its_time(watched):
    settings, seconds = watched.result.settings, watched.result.seconds
    assert settings["rho"] == "0.3" and settings["seed"] == "5" and settings["loss"] == "cross_entropy"
    assert settings["torch"] == torch.__version__ and "evaluate" not in settings
    assert {"analysis", "scoring", "fine-tuning", "evaluate", "latency", "fading curves"} <= seconds.keys()
    assert all(s > 0 for s in seconds.values())


def test_widths_and_latency_are_those_of_both_networks(watched):
    result = watched.result
    sizes = {r.group: (r.size, r.size - len(r.neurons)) for r in result.plan.removals}
    assert result.widths == {**sizes, "layers.4": (4, 4)}
    assert result.latency.samples == 8 and result.latency.before.rounds == result.latency.after.rounds
    assert result.latency.before.median > 0


def test_first_scores_are_those_of_the_whole_group(watched):
    for record in watched.result.history:
        assert len(record.first_scores) == record.size
        assert record.scores[0] == min(record.first_scores) == record.first_scores[record.removed[0]]


def test_fading_curves_are_recorded_and_change_nothing(watched, monkeypatch):
    for record in watched.result.history:
        assert [curve.neuron for curve in record.curves] == list(record.removed[-3:])
    monkeypatch.setattr("singe.curves.recorded", lambda *_: False)
    without = prune(mlp(), finetune=FineTune(steps=6), seed=5)
    assert not any(record.curves for record in without.history) and same_plan(without, watched.result)
    assert [r.scores for r in without.history] == [r.scores for r in watched.result.history]
    assert same(without.model.state_dict(), watched.result.model.state_dict())


def test_a_callback_that_fails_ends_the_run_and_leaves_everything_as_it_was():
    class Enough(Exception):
        pass

    def stop(record):
        torch.rand(1)
        raise Enough(record.group)

    model, generator = mlp().train(), torch.Generator().manual_seed(3)
    before = snapshot(model), random_states(generator)
    with pytest.raises(Enough, match=r"layers\.0"):
        prune(model, vectors(generator=generator), callbacks=[stop])
    assert same((snapshot(model), random_states(generator)), before)


def test_a_network_that_cannot_be_evaluated_is_not_pruned():
    told = []
    with pytest.raises(TypeError, match=r"expected evaluate\(model\) to return a number, got NoneType"):
        prune(mlp(), evaluate=lambda model: None, callbacks=[told.append])
    with pytest.raises(ValueError, match="finite number, got nan"):
        prune(mlp(), evaluate=lambda model: math.nan, callbacks=[told.append])
    assert not told


def test_what_cannot_watch_is_refused():
    with pytest.raises(TypeError, match="expected evaluate to be a function"):
        prune(mlp(), evaluate=0.9)
    with pytest.raises(TypeError, match="expected callbacks to be functions"):
        prune(mlp(), callbacks=["log"])
