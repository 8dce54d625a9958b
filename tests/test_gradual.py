import copy
import gc
import io
import logging
import math
import sys

import pytest
import torch
from networks import DigitNet, ExciteNet, FlattenNet, images, randomised
from states import global_settings, random_states, same
from torch import nn
from torch.nn import functional as F
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader, TensorDataset
from wiring import normal

import singe
from singe.graph.trace import named_tensors
from singe.models.batches import described

SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
CLASSES = 4


@pytest.fixture(autouse=True)
def one_export_of_each_network(monkeypatch):
    """The graph of one copy is run with the live parameters of another."""
    module = sys.modules["singe.gradual"]

    def trace(model, inputs, forward):
        key = str(model), described(inputs)
        if key not in TRACES:
            TRACES[key] = original(model, inputs, forward)
        return TRACES[key]

    original = module.trace
    monkeypatch.setattr(module, "trace", trace)


TRACES = {}


def mlp():
    layers = [nn.Linear(10, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, CLASSES)]
    return randomised(nn.Sequential(*layers)).train()


def samples(count=48):
    x = normal(count, 10)
    return TensorDataset(x, x[:, :CLASSES].argmax(1))


def loader(seed=0):
    return DataLoader(samples(), 16, shuffle=True, generator=torch.Generator().manual_seed(seed))


def pruner(model, **options):
    options = {"every": 1, "per_round": 4, "until": 3, "images": 32, **options}
    return singe.GradualPruner(model, samples().tensors[0][:4], **options)


def train(model, optimizer, batches):
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def masked(held):
    """Parameter or buffer, axis -> what of it is masked."""
    plan = singe.Plan()
    for record in held.history:
        for name, neurons in record.removed.items():
            plan.add(held._groups[name], list(neurons))
    return plan.removed()


def zeros(model, gone):
    """Whether all of it is zero."""
    tensors = named_tensors(model)
    return all(not tensors[name].index_select(dim, index).any() for (name, dim), index in gone.items())


# -- rounds ------------------------------------------------------------------------------------------------------


def test_rounds_come_every_so_many_epochs_until_the_last():
    model = mlp()
    held, batches = pruner(model, every=2, until=5, per_round=3), loader()
    records = [held.epoch_end(batches) for _ in range(7)]
    assert [record and record.epoch for record in records] == [None, 2, None, 4, None, None, None]
    assert held.history == [records[1], records[3]]
    assert held.epoch == 7
    for record in held.history:
        assert record.channels == sum(map(len, record.removed.values())) == 3
        assert record.removed.keys() == record.scores.keys()
        assert record.seconds > 0
    assert held.history[1].loss_removed != held.history[1].loss_start
    gone = [(name, n) for record in held.history for name, neurons in record.removed.items() for n in neurons]
    assert len(set(gone)) == 6
    assert zeros(model, masked(held))


def test_the_least_relevant_of_all_groups_go():
    model, batch = mlp(), loader()
    norms = {name: model[i].weight.detach().norm(dim=1).double() for name, i in (("0", 0), ("3", 3))}
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    norms["0"] = norms["0"] * scale.detach().double()
    ranked = sorted((v, name, n) for name, s in norms.items() for n, v in enumerate((s / s.norm()).tolist()))
    record = pruner(model, criterion="magnitude", per_round=5).epoch_end(batch)
    expected = {}
    for _, name, n in ranked[:5]:
        expected.setdefault(name, []).append(n)
    assert {name: list(neurons) for name, neurons in record.removed.items()} == expected
    scores = sorted(v for s in record.scores.values() for v in s)
    assert scores == pytest.approx([v for v, _, _ in ranked[:5]], rel=1e-4)


def test_the_last_of_a_group_stays(caplog):
    model = mlp()
    held = pruner(model, per_round=100)
    with caplog.at_level(logging.INFO, "singe"):
        record = held.epoch_end(loader())
    assert {name: len(neurons) for name, neurons in record.removed.items()} == {"0": 11, "3": 8}
    assert "19 channels are masked, not 100" in caplog.text
    assert held.epoch_end(loader()).removed == {}
    assert [layer.weight.shape[0] for layer in held.finish().model if isinstance(layer, nn.Linear)] == [1, 1, 4]


def test_a_coupled_neuron_counts_once_for_each_layer_that_writes_it():
    model, (x, y) = randomised(DigitNet(6)), images(24, channels=1, classes=10)
    held = singe.GradualPruner(model, x, every=1, per_round=20, until=2, criterion="magnitude", images=24)
    writers = {name: len(group.writers) for name, group in held._groups.items()}
    assert set(writers.values()) == {1, 2}
    for _ in range(2):
        record = held.epoch_end([(x, y)])
        assert record.channels == 20
        assert record.channels == sum(len(neurons) * writers[name] for name, neurons in record.removed.items())
    assert any(writers[name] == 2 for name in held.history[0].removed)


@pytest.mark.parametrize(
    "score", ["random", "loss_change", "reconstruction", singe.IntegratedGradient(quadrature=singe.GaussLegendre(2))]
)
def test_any_criterion_scores(score):
    model = mlp()
    held = pruner(model, criterion=score)
    records = [held.epoch_end(loader()) for _ in range(2)]
    assert [record.channels for record in records] == [4, 4]
    assert held.finish().params_removed > 0.2


def test_what_is_ignored_or_put_out_stays_whole():
    held = pruner(mlp(), ignore=["3"], per_round=100)
    assert held.frozen == {"3": "ignored", "5": "network output"}
    assert set(held.epoch_end(loader()).removed) == {"0"}
    assert held.finish().frozen == held.frozen


def test_networks_with_a_fixed_batch_are_scored_in_whole_batches():
    model, (x, y) = randomised(FlattenNet()), images(5)
    held = singe.GradualPruner(model, x, every=1, per_round=2, until=1, images=7)
    assert held.epoch_end([(x, y)]).channels == 2


# -- masks hold --------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, **SGD),
    "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masks_hold_whatever_optimiser_trains(kind):
    model, batches = mlp(), loader()
    optimizer, held = OPTIMIZERS[kind](model.parameters()), pruner(model)
    train(model, optimizer, batches)  # so that it remembers something
    held.epoch_end(batches)
    gone, before = masked(held), copy.deepcopy(model.state_dict())
    for _ in range(3):
        train(model, optimizer, batches)
        assert zeros(model, gone)
        for (name, dim), index in gone.items():
            for value in optimizer.state.get(named_tensors(model)[name], {}).values():
                assert value.dim() == 0 or not value.index_select(dim, index).any()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())
    hidden = model[:3](samples().tensors[0])
    assert not hidden[:, gone["0.weight", 0]].any()


def test_masks_hold_where_an_activation_makes_something_of_zero():
    model, batches = mlp(), loader()
    model[2], model[4] = nn.Sigmoid(), nn.Softplus()
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    held = pruner(model, criterion="magnitude")
    held.epoch_end(batches)
    train(model, optimizer, batches)
    assert zeros(model, masked(held))
    masked_outputs = model.eval()(samples().tensors[0])
    assert torch.allclose(held.finish().model(samples().tensors[0]), masked_outputs, atol=1e-5)


def test_optimisers_of_other_models_are_left_alone():
    model, other = mlp(), mlp()
    held = pruner(model)
    held.epoch_end(loader())
    train(other, torch.optim.SGD(other.parameters(), **SGD), loader())
    assert not zeros(other, masked(held))


def test_the_model_is_what_it_was_but_for_zeros():
    model, batches = mlp(), loader()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    F.cross_entropy(model(samples().tensors[0]), samples().tensors[1]).backward()
    before, modules = copy.deepcopy(model.state_dict()), [(m, m.training) for m in model.modules()]
    parameters = [(id(p), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    states, settings = random_states(batches.generator), global_settings()
    held = pruner(model, callbacks=[lambda record: list(batches)])
    held.epoch_end(batches)
    assert same(random_states(batches.generator), states)
    assert global_settings() == settings
    assert [(m, m.training) for m in model.modules()] == modules
    now = [(id(p), p.requires_grad, None if p.grad is None else p.grad) for p in model.parameters()]
    assert same([list(p) for p in now], [list(p) for p in parameters])
    assert model.state_dict().keys() == before.keys()
    for (name, dim), index in masked(held).items():
        before[name].index_fill_(dim, index, 0)
    assert same(dict(model.state_dict()), dict(before))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_pruner_that_is_dropped_or_done_holds_nothing():
    hooks, model = len(optimizers._global_optimizer_post_hooks), mlp()
    held, other = pruner(model), pruner(mlp())
    assert len(optimizers._global_optimizer_post_hooks) == hooks + 2
    del other
    gc.collect()
    assert len(optimizers._global_optimizer_post_hooks) == hooks + 1
    held.epoch_end(loader())
    held.finish()
    assert len(optimizers._global_optimizer_post_hooks) == hooks
    with pytest.raises(ValueError, match=r"finish\(\) was called"):
        held.epoch_end(loader())
    with pytest.raises(ValueError, match=r"finish\(\) was called"):
        held.finish()


# -- the end -----------------------------------------------------------------------------------------------------


def test_the_result_is_the_masked_model_made_smaller():
    model, batches, x = mlp(), loader(), samples().tensors[0]
    optimizer, held = torch.optim.SGD(model.parameters(), **SGD), pruner(model)
    for _ in range(4):
        train(model, optimizer, batches)
        held.epoch_end(batches)
    keys, parameters = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    result = held.finish()
    assert result.model.training
    assert list(model.state_dict()) == keys
    assert result.params_before == parameters > result.params_after == sum(p.numel() for p in result.model.parameters())
    assert result.macs_removed > 0.3
    assert result.history == held.history
    assert result.loss_before == held.history[0].loss_start
    assert math.isfinite(result.loss_after)
    assert sum(len(r.neurons) for r in result.plan.removals) == 12
    assert torch.allclose(copy.deepcopy(result.model).eval()(x), copy.deepcopy(model).eval()(x), atol=1e-5)
    result.plan.apply(model, optimizer)  # to train on
    assert same(dict(model.state_dict()), dict(result.model.state_dict()))
    train(model, optimizer, batches)


def test_without_a_round_nothing_is_removed(caplog):
    model = mlp()
    held = pruner(model, every=2)
    held.epoch_end(loader())
    result = held.finish()
    assert "no round has taken place until epoch 1" in caplog.text
    assert (result.params_removed, result.plan.removals, result.history) == (0, [], [])
    assert math.isnan(result.loss_before)


# -- checkpoints -------------------------------------------------------------------------------------------------


def epochs(model, optimizer, held, first, last):
    for epoch in range(first, last):
        train(model, optimizer, loader(epoch))
        held.epoch_end(loader(epoch))


def test_a_run_that_was_killed_comes_to_the_same():
    model = mlp()
    optimizer, held = torch.optim.SGD(model.parameters(), **SGD), pruner(model)
    epochs(model, optimizer, held, 0, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": held.state_dict()}, file)
    epochs(model, optimizer, held, 2, 4)

    again = mlp()
    resumed, other = torch.optim.SGD(again.parameters(), **SGD), pruner(again)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["pruner"])
    assert (other.epoch, other.history) == (2, held.history[:2])
    torch.rand(7)  # another random state
    epochs(again, resumed, other, 2, 4)
    assert [r.removed for r in other.history] == [r.removed for r in held.history]
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    a, b = held.finish(), other.finish()
    assert a.plan == b.plan
    assert (a.loss_before, a.loss_after) == (b.loss_before, b.loss_after)


def test_a_state_masks_the_model_it_is_loaded_for():
    first, second = mlp(), mlp()
    held = pruner(first)
    held.epoch_end(loader())
    other = pruner(second)
    other.load_state_dict(held.state_dict())
    assert zeros(second, masked(held))
    result = other.finish()
    assert result.params_removed > 0
    assert result.loss_before == held.history[0].loss_start
    assert math.isnan(result.loss_after)


def changed(key, value):
    def change(state):
        state[key] = value

    return change


def remove_all(state):
    state["history"][0]["removed"]["0"] = torch.arange(12)


BROKEN = {
    "nothing": (lambda state: state.clear(), "something else"),
    "version": (changed("version", 2), "version 1, got version 2"),
    "groups": (changed("groups", {"0": 12}), "groups"),
    "epoch": (changed("epoch", 0), "epoch >= 1"),
    "history": (changed("history", [{"epoch": 1}]), "something else"),
    "neurons": (remove_all, "different neurons of 0"),
}


@pytest.fixture(scope="module")
def state():
    held = pruner(mlp())
    held.epoch_end(loader())
    return held.state_dict()


@pytest.mark.parametrize("name", BROKEN)
def test_a_state_that_does_not_fit_is_refused(name, state, other_pruner):
    change, said = BROKEN[name]
    broken = copy.deepcopy(state)
    change(broken)
    before = copy.deepcopy(other_pruner._model.state_dict())
    with pytest.raises(ValueError, match=said):
        other_pruner.load_state_dict(broken)
    assert (other_pruner.epoch, other_pruner.history) == (0, [])
    assert same(dict(other_pruner._model.state_dict()), dict(before))


@pytest.fixture(scope="module")
def other_pruner():
    return pruner(mlp())


def test_a_state_of_other_settings_is_refused(state):
    with pytest.raises(
        ValueError, match=r"per_round was 4 and is 5; criterion was 'FeatureRelevance\(alpha=2\)' and is"
    ):
        pruner(mlp(), per_round=5, criterion="magnitude").load_state_dict(state)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"every": 0}, ValueError, "every >= 1"),
        ({"every": 2.0}, TypeError, "int for every"),
        ({"per_round": 0}, ValueError, "per_round >= 1"),
        ({"every": 4}, ValueError, "until=3 and every=4"),
        ({"images": 0}, ValueError, "images >= 1"),
        ({"seed": -1}, ValueError, "seed >= 0"),
        ({"seed": 2**40}, ValueError, r"seed < 2\*\*40"),
        ({"criterion": "gradients"}, ValueError, "criterion among"),
        ({"ignore": "3"}, TypeError, "list of module names"),
        ({"ignore": ["nothing"]}, ValueError, "nothing"),
        ({"ignore": ["*"]}, ValueError, "neurons to prune"),
        ({"loss": 3}, TypeError, "loss"),
    ],
)
def test_bad_arguments_are_refused(options, error, said):
    hooks = len(optimizers._global_optimizer_post_hooks)
    with pytest.raises(error, match=said):
        pruner(mlp(), **options)
    assert len(optimizers._global_optimizer_post_hooks) == hooks


def test_an_operator_without_a_rule_is_named_before_training_begins():
    with pytest.raises(ValueError, match=r"aten\.mul\.Tensor"):
        singe.GradualPruner(randomised(ExciteNet()), images()[0], every=1, per_round=1, until=1)


def test_weight_norms_are_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(10, 4)), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="without weight norms, got one in 0"):
        pruner(model)


@pytest.mark.parametrize(
    ("batches", "error"),
    [([], ValueError), (iter([]), TypeError), ([normal(3, 10)], TypeError), ([(normal(3, 10), normal(3))], ValueError)],
)
def test_a_loader_that_cannot_be_scored_on_is_refused_and_the_epoch_does_not_count(batches, error, other_pruner):
    before = copy.deepcopy(other_pruner._model.state_dict())
    with pytest.raises(error):
        other_pruner.epoch_end(batches)
    assert (other_pruner.epoch, other_pruner.history) == (0, [])
    assert same(dict(other_pruner._model.state_dict()), dict(before))


# -- wrapped models ----------------------------------------------------------------------------------------------


def test_of_a_parallel_model_the_module_inside_is_masked():
    alone, inside = mlp(), mlp()
    parallel = nn.DataParallel(inside)
    expected, held = pruner(alone).epoch_end(loader()), pruner(parallel)
    assert held.epoch_end(loader()).removed == expected.removed
    train(parallel, torch.optim.SGD(parallel.parameters(), **SGD), loader())
    assert zeros(inside, masked(held))


def test_it_tells_how_far_it_is():
    held = pruner(mlp())
    before = repr(held)
    held.epoch_end(loader())
    masked_now = sum(map(len, held.history[0].removed.values()))
    assert before.startswith("GradualPruner(epoch 0, 0 neurons masked, ") and masked_now
    assert repr(held).startswith(f"GradualPruner(epoch 1, {masked_now} neurons masked, ")


# -- who watches -------------------------------------------------------------------------------------------------


def zeros_in(model):
    return float(sum((p == 0).sum() for p in model.parameters()))


def test_rounds_are_evaluated_and_handed_over():
    model, told = mlp(), []
    held = pruner(model, criterion="magnitude", evaluate=zeros_in, callbacks=[told.append])
    for _ in range(2):
        held.epoch_end(loader())
    result = held.finish()
    first, second = held.history
    assert told == [first, second]
    assert first.evaluation_start == result.evaluation_before < first.evaluation_removed == second.evaluation_start
    assert second.evaluation_removed == zeros_in(model) > result.evaluation_after
    assert result.latency.samples == 4 and result.settings["per_round"] == "4" and result.seconds["rounds"] > 0
    assert result.widths == {n: (m.out_features, result.model.get_submodule(n).out_features) for n, m in
                             model.named_modules() if isinstance(m, nn.Linear)}  # fmt: skip


def test_an_epoch_whose_evaluation_fails_does_not_count():
    model, answers = mlp(), iter([0.5, math.nan])
    held, before = (
        pruner(model, criterion="magnitude", evaluate=lambda _: next(answers)),
        copy.deepcopy(model.state_dict()),
    )
    with pytest.raises(ValueError, match="finite number, got nan"):
        held.epoch_end(loader())
    assert (held.epoch, held.history) == (0, []) and same(dict(model.state_dict()), dict(before))


def test_an_exception_of_a_callback_comes_when_the_round_is_over():
    def fails(record):
        raise KeyError(record.epoch)

    model, state = mlp(), random_states()
    held = pruner(model, criterion="magnitude", callbacks=[fails])
    with pytest.raises(KeyError, match="1"):
        held.epoch_end(loader())
    assert held.epoch == len(held.history) == 1 and same(random_states(), state)


def test_records_of_a_state_are_handed_over_first():
    held, told = pruner(mlp(), criterion="magnitude"), []
    held.epoch_end(loader())
    pruner(mlp(), criterion="magnitude", callbacks=[told.append]).load_state_dict(held.state_dict())
    assert told == held.history


def test_what_cannot_watch_is_refused():
    with pytest.raises(TypeError, match="expected evaluate to be a function"):
        pruner(mlp(), evaluate=1.0)


def test_a_model_that_was_cast_since_is_refused():
    model = mlp()
    held = pruner(model)
    held.epoch_end(loader())
    model.double()
    message = (
        r"a model of torch\.float32 on cpu, as it was when GradualPruner was made, got one of torch\.float64 on cpu"
    )
    for call in (lambda: held.epoch_end(loader()), held.finish, lambda: held.load_state_dict({})):
        with pytest.raises(ValueError, match=message):
            call()
    model.float()
    assert held.finish().history == held.history


def test_a_step_touches_no_weights_but_its_own():
    model, other = mlp(), nn.Linear(2, 2)
    held, batches = pruner(model), loader()
    held.epoch_end(batches)
    x = samples().tensors[0]
    # another network's step between passes
    loss, aside = model(x).square().mean(), torch.optim.SGD(other.parameters(), **SGD)
    other(torch.ones(1, 2)).sum().backward()
    aside.step()
    loss.backward()
    # two optimisers that take turns on one graph
    body, head = (torch.optim.SGD(part.parameters(), **SGD) for part in (model[:3], model[3:]))
    features = model[:3](x)
    loss = features.square().mean()
    model[3:](features.detach()).square().mean().backward()
    head.step()
    loss.backward()
    body.step()
    assert zeros(model, masked(held))


def test_masks_hold_where_each_weight_steps_within_the_backward_pass():
    model = mlp()
    held = pruner(model)
    steps = {p: torch.optim.SGD([p], **SGD) for p in model.parameters()}

    def step(parameter):
        steps[parameter].step()
        steps[parameter].zero_grad()

    hooks = [parameter.register_post_accumulate_grad_hook(step) for parameter in steps]
    for _ in range(2):
        held.epoch_end(loader())
        for x, y in loader():
            F.cross_entropy(model(x), y).backward()
            assert zeros(model, masked(held))
    assert len(hooks) == 8 and held.finish().params_removed > 0


def test_masks_hold_where_an_optimiser_has_all_weights_in_one_tensor():
    model = mlp()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    parts = flat.detach().split([p.numel() for p in model.parameters()])
    for parameter, part in zip(model.parameters(), parts, strict=True):
        parameter.data = part.view_as(parameter)
    held, optimizer = pruner(model), torch.optim.SGD([flat], **SGD)
    held.epoch_end(loader())
    before, flat.grad = model[0].weight.clone(), torch.ones_like(flat)
    optimizer.step()
    assert zeros(model, masked(held)) and not torch.equal(model[0].weight, before)
