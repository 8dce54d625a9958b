"""Algorithm 1, from the first group to the result."""

import copy
import logging
import math

import pytest
import torch
from networks import MLP, DigitNet, PlainNet, images, randomised
from pruning import CRITERIA, learned, mlp, parameters, prune, random_states, same_plan, snapshot, vectors
from states import same
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe import FineTune, reference
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.removal.plan import Plan
from singe.removal.surgery import compact, mask
from singe.removal.trial import expanded
from singe.training.data import Stream

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
    assert len(steps) == 1 + 7  # one of the rehearsal
    changed = [abs(r.loss_end - r.loss_removed) > 1e-5 for r in result.history]
    assert len(changed) == 2
    assert all(changed) if when == "layer" else not any(changed)


@pytest.mark.parametrize(
    "tuned", [FineTune(20, "neuron", 0.1), FineTune(20, "neuron", 0.01, optimizer="adamw")], ids=lambda t: t.optimizer
)
def test_tuning_after_every_neuron_keeps_what_is_masked_out(tuned):
    result = prune(mlp(), finetune=tuned)
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
    assert singe.accuracy(better.model, [digit_data[1].tensors]) > singe.accuracy(plain.model, [digit_data[1].tensors])


def test_a_last_batch_of_one_image_does_not_stop_recalibration_at_the_end_of_a_run():
    data = vectors(count=33).dataset
    result = prune(normed(), DataLoader(data, batch_size=16), recalibrate_bn=33, criterion="magnitude")
    assert all(t.isfinite().all() for pair in statistics(result.model).values() for t in pair)


def test_each_group_is_logged_and_one_that_nothing_depends_on_too(caplog):
    model, (x, y) = randomised(PlainNet()), images(20)
    with torch.no_grad():
        for p in model.features[4].parameters():
            p.zero_()
    options = {"images": 10, "progress": False, "finetune": None, "compensate": "none", "criterion": "magnitude"}
    with caplog.at_level("INFO", "singe"):
        result = singe.prune(model, [(x, y)], 0.4, allocation="uniform", **options)
    for i, record in enumerate(result.history):
        left = record.size - len(record.removed)
        assert f"group {i + 1} of {len(result.history)}: {record.group} {record.size} -> {left}; loss" in caplog.text
    assert "every score of features.4 is 0" in caplog.text and "every score of features.0" not in caplog.text
