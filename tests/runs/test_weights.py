import copy
import logging
import random

import numpy as np
import pytest
import torch
from networks import MLP, DigitNet, MobileNet, PlainNet, images, randomised
from states import global_settings, random_states, same, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe import FineTune, reference
from singe.graph.trace import trace
from singe.models.batches import described
from singe.report.facts import load as load_facts
from singe.runs.weights import without_least
from singe.training.data import Stream


@pytest.fixture(scope="module", autouse=True)
def one_export():
    """Exports each kind of network once: the graph of one copy is run with the live parameters of another."""
    kept = {}

    def traced(model, inputs, forward):
        key = type(model), tuple(model.state_dict()), described(inputs), forward
        if key not in kept:
            kept[key] = trace(model, inputs, forward)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("singe.runs.workspace.trace", traced)
        yield


def vectors(count=40, **options):
    """A shuffling loader over vectors in four clusters."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(count) % 4
    x = torch.randn(4, 10, generator=generator)[y] * 2 + torch.randn(count, 10, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, **options)


def pictures():
    return DataLoader(TensorDataset(*images(24)), batch_size=8, shuffle=True)


def prune(model, loader=None, rho=0.8, **options):
    """``singe.prune`` of single weights, small and quiet."""
    quick = {"structured": False, "criterion": "integrated_gradient", "finetune": None, "images": 20}
    options = quick | {"progress": False} | options
    return singe.prune(model, vectors() if loader is None else loader, rho, **options)


def mlp(seed=0):
    return randomised(MLP(), seed)


def same_masks(a, b):
    return a.masks.keys() == b.masks.keys() and all(torch.equal(m, b.masks[n]) for n, m in a.masks.items())


def zeros(result):
    """Name of each masked weight -> whether its zeros are those that the result says."""
    return {n: torch.equal(p == 0, ~result.masks[n]) for n, p in weights_of(result.model).items() if n in result.masks}


def weights_of(model):
    """What the modules compute with, masks on or not."""
    names = [f"{n}.weight" for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), torch.Tensor)]
    return {name: model.get_submodule(name[: -len(".weight")]).weight for name in names}


# -- one run of a residual network, looked at from all sides -----------------------------------------------------


class Run:
    """A DigitNet in a mixed state, 80 % of its weights pruned with fine-tuning, watched step by step."""

    def __init__(self):
        self.model = randomised(DigitNet(4))
        x, y = images(40, channels=1)
        F.cross_entropy(self.model(x), y).backward()
        self.model.train()
        self.model.blocks[0].bn1.eval()
        self.model.blocks[1].conv1.requires_grad_(False)
        generator = torch.Generator().manual_seed(11)
        loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=generator)
        before = snapshot(self.model), random_states(generator), global_settings()
        self.zeros_by_step, self.momenta = [], []
        hook = register_optimizer_step_post_hook(self.look)
        self.told, self.counted = [], []
        self.result = prune(
            self.model, loader, finetune=FineTune(steps=24, when="layer", lr=0.1, weight_decay=0.1), images=24, seed=3,
            evaluate=self.count, callbacks=[self.told.append],
        )  # fmt: skip
        hook.remove()
        self.as_before = same((snapshot(self.model), random_states(generator), global_settings()), before)

    def count(self, model):
        """How many weights are zero."""
        torch.rand(3)
        self.counted.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
        return self.counted[-1]

    def look(self, optimizer, *_):
        """Counts zeros behind every step."""
        large = [p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1]
        self.zeros_by_step.append(sum(int((p == 0).sum()) for p in large))
        self.momenta.append(all(not optimizer.state[p]["momentum_buffer"][p == 0].any() for p in large))


@pytest.fixture(scope="module")
def run():
    return Run()


def test_the_users_model_and_every_random_generator_are_as_before(run):
    assert run.as_before


def test_the_share_is_met_to_the_weight_and_the_same_in_every_layer(run):
    result = run.result
    total = sum(w.numel() for w in weights_of(run.model).values() if w.dim() > 1)
    assert result.weights_before == total and result.weights_after == total - round(0.8 * total)
    assert sum(int((~m).sum()) for m in result.masks.values()) == total - result.weights_after
    assert result.params_before - result.params_after == total - result.weights_after
    assert result.params_before == sum(p.numel() for p in run.model.parameters())
    shares = [1 - float(m.float().mean()) for m in result.masks.values()]
    assert all(abs(share - 0.8) * mask.numel() <= 1 for share, mask in zip(shares, result.masks.values(), strict=True))
    assert result.weights_removed == pytest.approx(0.8, abs=1 / total) and not result.frozen


def test_masks_are_held_through_fine_tuning(run):
    frozen = int((~run.result.masks["blocks.1.conv1.weight"]).sum())
    assert len(run.zeros_by_step) == 1 + 24 and all(run.momenta)
    gone = [record.removed for record in run.result.history]
    assert run.zeros_by_step[0] == 0  # of the rehearsal
    # the frozen layer is no parameter of the optimiser
    assert run.zeros_by_step[-1] == sum(gone) - frozen
    assert run.zeros_by_step == sorted(run.zeros_by_step)
    assert all(zeros(run.result).values())


def test_what_is_left_was_tuned_and_what_is_frozen_was_not(run):
    for name, weight in weights_of(run.result.model).items():
        if name in run.result.masks:
            kept, given = run.result.masks[name], run.model.get_parameter(name)
            assert torch.equal(weight[kept], given[kept]) == (name == "blocks.1.conv1.weight"), name


def test_the_result_is_of_the_same_class_and_in_the_same_state(run):
    model = run.result.model
    assert type(model) is DigitNet
    assert [m.training for m in model.modules()] == [m.training for m in run.model.modules()]
    trained = {n: p.requires_grad for n, p in run.model.named_parameters()}
    assert {n.removesuffix("_orig"): p.requires_grad for n, p in model.named_parameters()} == trained


def test_history_tells_of_every_layer_in_execution_order(run):
    names = [record.weight for record in run.result.history]
    assert names == list(run.result.masks) and names[0] == "stem.weight" and names[-1] == "head.weight"
    for record in run.result.history:
        assert record.size == run.result.masks[record.weight].numel()
        assert record.removed == int((~run.result.masks[record.weight]).sum())
        assert min(record.loss_start, record.loss_removed, record.loss_end) > 0
        assert record.seconds_scoring > 0 and record.seconds_tuning > 0


def test_who_watches_gets_every_record_and_the_network_behind_it(run):
    result = run.result
    assert run.told == result.history
    evaluations = [result.evaluation_before, *(r.evaluation for r in result.history), result.evaluation_after]
    gone = [sum(r.removed for r in result.history[:count]) for count in range(len(result.history) + 1)]
    assert evaluations == run.counted == [*gone, gone[-1]]
    assert result.settings["images"] == "24" and {"scoring", "fine-tuning", "evaluate"} <= result.seconds.keys()


def test_masks_are_torchs_and_hold_in_training_that_goes_on(run):
    model = copy.deepcopy(run.result.model)
    assert torch_prune.is_pruned(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x, y = images(16, channels=1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(torch.equal(model.get_submodule(n[:-7]).weight == 0, ~m) for n, m in run.result.masks.items())
    torch_prune.l1_unstructured(model.head, "weight", 1)  # goes on from the mask that is there
    assert int((model.head.weight_mask == 0).sum()) == int((~run.result.masks["head.weight"]).sum()) + 1


def test_permanent_zeros_are_in_plain_parameters(run):
    result, x = copy.deepcopy(run.result), images(4, channels=1)[0]
    result.model.eval()
    expected = result.model(x)
    for _ in range(2):
        result.make_permanent()
        assert not torch_prune.is_pruned(result.model)
        assert torch.equal(result.model(x), expected)
    assert set(result.model.state_dict()) == set(run.model.state_dict())
    fresh = DigitNet(4).eval()
    fresh.load_state_dict(result.model.state_dict())
    assert torch.equal(fresh(x), expected)


def test_state_dicts_go_into_a_network_with_masks(run):
    model = randomised(DigitNet(4), seed=9)
    for name in run.result.masks:
        torch_prune.identity(model.get_submodule(name[:-7]), "weight")
    model.load_state_dict(run.result.model.state_dict())
    x = images(4, channels=1)[0]
    assert torch.equal(model.eval()(x), copy.deepcopy(run.result.model).eval()(x))


def test_a_result_prints(run):
    text = str(run.result).splitlines()
    assert text[2].split() == ["weights", f"{run.result.weights_before:,}", f"{run.result.weights_after:,}", "-80.0%"]
    assert text[3].split()[0] == "parameters" and text[4].split()[0] == "loss"


@pytest.mark.parametrize("permanent", [False, True])
def test_what_is_saved_loads_as_it_was(run, permanent, tmp_path):
    result = copy.deepcopy(run.result)
    if permanent:
        result.make_permanent()
    result.save(tmp_path)
    fresh = randomised(DigitNet(4), seed=5)
    loaded, x = singe.load(fresh, tmp_path), images(4, channels=1)[0]
    assert type(copy.deepcopy(loaded)) is DigitNet
    assert torch.equal(loaded(x), result.model.eval()(x))
    assert same(dict(sorted(loaded.state_dict().items())), dict(sorted(result.model.state_dict().items())))
    assert torch_prune.is_pruned(loaded) != permanent and not torch_prune.is_pruned(fresh)
    assert load_facts(tmp_path).tensors == result.history  # whose report.json is of these masks


def test_a_result_writes_a_report(run, tmp_path):
    page = run.result.report(tmp_path).read_text()
    assert "parameters are masked, in 10 weight tensors" in page and (tmp_path / "report-widths.png").exists()


# -- the algorithm -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["magnitude", "integrated_gradient", "summed_gradient"])
def test_masks_are_those_of_the_algorithm_in_plain_autograd(criterion):
    model, loader = randomised(PlainNet()).double(), pictures()
    loader.dataset.tensors = loader.dataset.tensors[0].double(), loader.dataset.tensors[1]
    result = prune(model, loader, 0.7, criterion=criterion, images=16, seed=2)
    work, stream = copy.deepcopy(model), Stream(loader, torch.device("cpu"))
    with torch.random.fork_rng():
        for index, record in enumerate(result.history):
            stream.restart((2 << 20) + index)
            scores = reference.weight_scores(work, stream.take(16), record.weight, criterion=criterion)
            kept = scores > scores.flatten().kthvalue(record.removed).values
            assert torch.equal(kept, result.masks[record.weight])
            with torch.no_grad():
                work.get_parameter(record.weight).mul_(kept)


def test_the_least_go_and_of_equal_ones_the_first():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
    assert without_least(scores, 3).tolist() == [[True, False, True], [False, False, True]]
    assert without_least(scores.T, 2).T.tolist() == [[True, True, True], [False, False, True]]


@pytest.mark.parametrize("make", [PlainNet, MobileNet])
@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_every_kind_of_layer_loses_its_share(make, rho):
    tuned = FineTune(steps=9, when="after", lr=1e-3, optimizer="adamw")
    result = prune(randomised(make()), pictures(), rho, finetune=tuned, images=8)
    assert abs(result.weights_removed - rho) * result.weights_before <= 0.5
    assert all(zeros(result).values()) and len(zeros(result)) == len(result.history)


def test_the_last_fine_tuning_comes_after_all_masks():
    seen, hook = [], None
    try:
        hook = register_optimizer_step_post_hook(
            lambda o, *_: seen.append([int((p == 0).sum()) for p in o.param_groups[0]["params"]])
        )
        result = prune(mlp(), finetune=FineTune(steps=5, when="after"))
    finally:
        hook.remove()
    assert seen[1:] == [[record.removed for record in result.history]] * 5  # the first is of the rehearsal
    assert all(record.seconds_tuning == 0 for record in result.history)


@pytest.mark.parametrize(
    ("allocation", "rising"), [("linear", True), ("block", True), ({"layers.0": 0.5, "layers.4*": 2}, True)]
)
def test_allocations_share_out(allocation, rising):
    result = prune(mlp(), rho=0.4, allocation=allocation)
    shares = [record.removed / record.size for record in result.history]
    assert (shares == sorted(shares)) == rising and shares[0] < shares[-1]
    assert result.weights_removed == pytest.approx(0.4, abs=1 / result.weights_before)


def test_the_default_is_magnitude():
    assert same_masks(prune(mlp(), criterion=None), prune(mlp(), criterion="magnitude"))
    assert not same_masks(prune(mlp(), criterion=None), prune(mlp()))


def test_one_ranking_of_all_weights():
    model = mlp()
    result = prune(model, rho=0.6, allocation="global", criterion="magnitude")
    values = torch.cat([p.detach().abs().flatten() for p in model.parameters() if p.dim() > 1])
    limit = values.sort().values[round(0.6 * len(values)) - 1]
    assert {n: int((~m).sum()) for n, m in result.masks.items()} == {
        n: int((p.abs() <= limit).sum()) for n, p in model.named_parameters() if p.dim() > 1
    }


def test_what_is_ignored_stays_whole_and_the_others_lose_more():
    result = prune(mlp(), rho=0.4, ignore=["layers.0", "layers.4.weight"])
    assert result.frozen == {"layers.0.weight": "ignored", "layers.4.weight": "ignored"}
    assert list(result.masks) == ["layers.2.weight"] and "left whole: layers.0.weight (ignored)" in str(result)
    assert int((~result.masks["layers.2.weight"]).sum()) == round(0.4 * result.weights_before)
    assert prune(mlp(), rho=0.4, allocation={"layers.0": 0}).frozen == {
        "layers.0.weight": "the allocation gives it no share"
    }
    with pytest.raises(ValueError, match=r"expected rho <= 0\.4053, which removes all that can be removed, got 0\.9"):
        prune(mlp(), rho=0.9, ignore=["layers.0", "layers.4.weight"])
    with pytest.raises(ValueError, match="match one in ignore, got 'nothing'"):
        prune(mlp(), ignore=["nothing"])


class Shared(nn.Module):
    """A weight in two modules of which one is called twice, and one that only train mode uses."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b, self.head = nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.aux = nn.Linear(6, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        y = self.first(x).relu()
        z = self.head(self.b(self.a(self.a(y).relu()).relu()).relu())
        return z + self.aux(y) if self.training else z


def test_tied_weights_are_one_and_what_eval_mode_does_not_use_stays():
    model = randomised(Shared())
    result = prune(model, rho=0.5, finetune=FineTune(steps=12, when="layer"))
    assert list(result.masks) == ["first.weight", "a.weight", "head.weight"]
    assert result.weights_before == 60 + 36 + 24 + 24
    assert result.frozen == {"aux.weight": "no convolution or linear layer reads it in eval mode"}
    assert result.model.a.weight_orig is result.model.b.weight_orig
    assert torch.equal(result.model.a.weight == 0, ~result.masks["a.weight"])
    result.make_permanent()
    assert result.model.a.weight is result.model.b.weight
    assert torch.equal(result.model.a.weight == 0, ~result.masks["a.weight"])


def test_computed_weights_stay_whole():
    model = mlp()
    weight_norm(model.layers[2])
    result = prune(model, rho=0.5)
    assert list(result.frozen) == ["layers.2.parametrizations.weight.original1"]
    assert list(result.masks) == ["layers.0.weight", "layers.4.weight"]
    for index in (0, 4):
        weight_norm(model.layers[index])
    with pytest.raises(ValueError, match="expected a model with weights to prune, found none"):
        prune(model)


def test_the_projection_that_attention_reads_past_its_module_stays():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    x = torch.randn(24, 3, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, torch.arange(24) % 4), batch_size=8, shuffle=True)
    result = prune(Attention(), loader, 0.5, finetune=FineTune(steps=4, when="layer"))
    assert list(result.masks) == ["attention.in_proj_weight", "head.weight"]
    assert "attention is not called" not in str(result) and "attention.out_proj is not called" in str(result)
    model = result.model.train()
    for _ in range(2):
        model(x).sum().backward()
    assert torch.equal(model.attention.in_proj_weight == 0, ~result.masks["attention.in_proj_weight"])


def test_zeros_go_first_so_that_a_network_is_pruned_on():
    first = prune(mlp(), rho=0.5)
    first.make_permanent()
    second = prune(first.model, rho=0.8)
    assert all(not (second.masks[n] & ~m).any() for n, m in first.masks.items())
    assert second.weights_removed == pytest.approx(0.8, abs=1 / second.weights_before)


def test_seeds_and_samples_decide():
    a, b, c = (prune(mlp(), seed=seed, finetune=FineTune(steps=6, when="layer")) for seed in (0, 0, 1))
    assert same_masks(a, b) and not same_masks(a, c)
    assert same(a.model.state_dict(), b.model.state_dict())


def test_the_module_inside_of_a_wrapper_is_pruned():
    result = prune(nn.DataParallel(mlp()))
    assert type(result.model) is MLP and same_masks(result, prune(mlp()))


def test_recalibration_changes_the_statistics_only():
    model = randomised(PlainNet())
    plain, again = (prune(model, pictures(), recalibrate_bn=n, images=8) for n in (0, 16))
    assert same_masks(plain, again)
    assert not torch.equal(plain.model.features[1].running_mean, again.model.features[1].running_mean)


def test_any_forward_and_loss():
    def forward(model, batch):
        return model(batch["x"])

    def loss(outputs, batch):
        return F.mse_loss(outputs, F.one_hot(batch["y"], 4).float())

    x, y = vectors().dataset.tensors
    loader = [{"x": x[i : i + 20], "y": y[i : i + 20]} for i in (0, 20)]
    result = prune(mlp(), loader, forward=forward, loss=loss, finetune=FineTune(steps=3, when="layer"))
    assert result.weights_removed == pytest.approx(0.8, abs=1 / result.weights_before)


# -- promises ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What no code of the package expects."""


@pytest.mark.parametrize("after", [0, 2, 9])
def test_all_is_as_before_when_the_loss_fails_in_the_middle(after):
    calls = []

    def loss(outputs, batch):
        calls.append(torch.rand(()) + np.random.rand() + random.random())
        if len(calls) > after:
            raise Stop("loss")
        return F.cross_entropy(outputs, batch[1])

    model = mlp().train()
    before = snapshot(model), random_states(), global_settings()
    with pytest.raises(Stop):
        prune(model, loss=loss, finetune=FineTune(steps=6, when="layer"))
    assert same((snapshot(model), random_states(), global_settings()), before)


def test_a_network_that_collapses_is_warned_about(trained, digit_data, caplog):
    loader = DataLoader(digit_data[0], batch_size=64, shuffle=True)
    prune(trained, loader, 0.97, criterion="random", images=64)
    assert "may have collapsed" in caplog.text


def test_fine_tuning_wins_back_what_pruning_lost(trained, digit_data, caplog):
    loader = DataLoader(digit_data[0], batch_size=64, shuffle=True)
    result = prune(trained, loader, 0.8, images=64, finetune=FineTune(steps=60, when="layer"))
    assert result.loss_after < 0.2 and "collapsed" not in caplog.text
    assert singe.accuracy(result.model, [digit_data[1].tensors]) > 0.9


def test_a_loss_that_is_not_finite_is_refused():
    calls = []

    def loss(outputs, batch):
        calls.append(1)
        return F.cross_entropy(outputs, batch[1]) * (float("nan") if len(calls) > 12 else 1)

    with pytest.raises(ValueError, match="finite"):
        prune(mlp(), loss=loss)
    model = mlp()
    with torch.no_grad():
        model.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity in layers\.0\.weight"):
        prune(model)


def test_a_share_of_less_than_a_weight_removes_nothing(caplog):
    with caplog.at_level(logging.WARNING, "singe"):
        result = prune(mlp(), rho=1e-4, finetune=FineTune(steps=2, when="layer"))
    assert not result.masks and "nothing is removed" in caplog.text and result.weights_removed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "macs"}, "expected target='params' with structured=False"),
        ({"round_to": 8}, "expected round_to=1 with structured=False"),
        ({"refresh": "full"}, "expected refresh='lazy' with structured=False"),
        ({"compensate": "mean"}, "expected compensate='none' with structured=False"),
        ({"compensation_images": 10}, "expected compensation_images=1024 with structured=False"),
        ({"analysis_seconds": 5}, "expected analysis_seconds=600 with structured=False"),
        ({"latency_batch": 2}, "expected latency_batch=1 with structured=False"),
        ({"finetune": FineTune(when="neuron")}, "expected finetune.when 'layer' or 'after'"),
        ({"allocation": "sensitivity"}, "an allocation other than 'sensitivity' with structured=False"),
        ({"criterion": "loss_change"}, "scores single weights"),
        ({"criterion": singe.IntegratedGradient()}, "expected path='layer'"),
        ({"rho": 1.0}, r"expected rho in \(0, 1\)"),
        ({"allocation": "even"}, "expected allocation among"),
    ],
)
def test_what_does_not_apply_is_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        prune(mlp(), **options)
    assert not list(tmp_path.iterdir())


def test_structured_is_a_truth_value():
    with pytest.raises(TypeError, match="expected structured to be True or False, got 'no'"):
        prune(mlp(), structured="no")


@pytest.mark.parametrize("memory", [1 << 30, 300])
def test_weights_that_no_gradient_reaches_go_first(memory):
    class Detached(MLP):
        def forward(self, x):
            return super().forward(x).detach() + self.aside(x)

        def __init__(self):
            super().__init__()
            self.aside = nn.Linear(10, 4)

    rates = {"*": 0.2, "aside": 0.5}
    result = prune(randomised(Detached()), memory=memory, rho=0.2, allocation=rates)
    assert {record.weight: record.removed for record in result.history}["aside.weight"] > 15


def test_a_loss_that_sees_more_than_the_outputs_is_refused():
    seen = []

    class Watched(MLP):
        def forward(self, x):
            seen[:] = [super().forward(x)]
            return seen[0]

    def loss(outputs, batch):
        return F.cross_entropy(outputs, batch[1]) + seen[0].abs().mean()

    with pytest.raises(ValueError, match="outputs and the batch alone"):
        prune(randomised(Watched()), loss=loss)
    with pytest.raises(ValueError, match="depends smoothly on the weights"):
        prune(randomised(MLP()), loss=lambda outputs, batch: outputs.detach().mean())
    assert prune(randomised(Watched()), loss=loss, criterion="magnitude").history
