import copy
import logging

import pytest
import torch
from networks import DigitNet, Experts, PlainNet, images, randomised
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wiring import Wired, normal

import singe
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.refit.compensation import Compensator, reached
from singe.refit.equations import Wanted
from singe.removal.plan import Plan
from singe.task import Task


def compensated(model, x, removed, how="least_squares", memory=1 << 30):
    """A pruned copy of a model, what was refused, and the outputs of all three: unpruned, pruned, compensated."""
    graph = trace(model.eval(), x)
    plan, groups = Plan(), {g.name: g for g in find_groups(graph)}
    for name, neurons in removed.items():
        plan.add(groups[name], neurons)
    small = plan.apply(copy.deepcopy(model))
    outputs = [model(x), small(x)]
    refused: dict[str, str] = {}
    for name in removed:
        helper = Compensator(Wanted(model, graph, (x, None), Task(), memory, plan), how)
        refused |= helper.refit(small, trace(small, x), groups[name])
    return small, refused, [*outputs, small(x)]


def error(actual, expected):
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


def twins(kind, inner, **options):
    """Two layers, the first of which writes every channel twice."""
    return nn.Sequential(twice(kind(3, 8, **options)), inner, kind(8, 6, **options))


@torch.no_grad()
def twice(layer):
    """A layer of 8 rows that are made the same two by two."""
    for p in layer.parameters():
        p[4:] = p[:4]
    return layer


def upsampled(dims, **options):
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}
    kind, transposed = kinds[dims]
    return nn.Sequential(twice(kind(3, 8, 1)), nn.ReLU(), transposed(8, 6, **options))


class SharedHead(nn.Module):
    """A pyramid of three levels with one head for all of them, as detectors have it."""

    def __init__(self, norm=False):
        super().__init__()
        self.level, self.head = twice(nn.Conv2d(3, 8, 3, padding=1)), nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()

    def forward(self, x):
        levels = [self.norm(self.head(self.level(F.avg_pool2d(x, size)).relu())) for size in (1, 2, 4)]
        return torch.cat([level.flatten(2) for level in levels], 2)


CONV = {"kernel_size": 3}


class SharedTerms(nn.Module):
    """A layer whose uses are terms of one sum, beside another."""

    def __init__(self):
        super().__init__()
        self.level, self.head, self.other = twice(nn.Linear(3, 8)), nn.Linear(8, 6), nn.Linear(3, 6)

    def forward(self, x):
        h = self.level(x)
        return self.head(h.relu()) + (self.other(x) + self.head(h.tanh())) + self.head(h.sin())


LAYERS = {
    "linear": (lambda: twins(nn.Linear, nn.ReLU()), (40, 3)),
    "sequence": (lambda: twins(nn.Linear, nn.ReLU()), (20, 5, 3)),
    "conv": (lambda: twins(nn.Conv2d, nn.ReLU(), **CONV, padding=1), (20, 3, 7, 6)),
    "strided": (lambda: twins(nn.Conv2d, nn.ReLU(), **CONV, stride=(2, 1), dilation=(1, 2)), (30, 3, 9, 12)),
    "same": (lambda: twins(nn.Conv2d, nn.ReLU(), kernel_size=(4, 3), padding="same"), (20, 3, 7, 6)),
    "1d": (lambda: twins(nn.Conv1d, nn.ReLU(), **CONV, padding=2), (30, 3, 9)),
    "3d": (lambda: twins(nn.Conv3d, nn.ReLU(), kernel_size=2), (20, 3, 4, 5, 4)),
    "transposed": (lambda: upsampled(2, kernel_size=2, stride=2), (30, 3, 5, 6)),
    "overlapping": (lambda: upsampled(1, kernel_size=5, stride=2, padding=1, output_padding=1), (60, 3, 9)),
    "shared": (SharedHead, (40, 3, 8, 8)),
    "shared in a sum": (SharedTerms, (80, 3)),
    "shared with its norm": (lambda: randomised_norms(SharedHead(norm=True)), (40, 3, 8, 8)),
}


def randomised_norms(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
    return model


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_a_reader_takes_from_the_twin_what_it_took_from_the_one_that_is_gone(make, shape):
    torch.manual_seed(0)
    model, x = make().double(), normal(*shape, dtype=torch.float64)
    written = next(name for name, module in model.named_modules() if hasattr(module, "weight"))
    _, refused, (whole, pruned, refitted) = compensated(model, x, {written: [0, 5, 2]})
    assert refused == {}
    assert error(pruned, whole) > 0.1 and error(refitted, whole) < 1e-3


def test_each_group_of_a_convolution_is_refitted_by_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)).double()
    with torch.no_grad():
        for p in model[0].parameters():
            p[[2, 3, 6, 7]] = p[[0, 1, 4, 5]]
    _, refused, (whole, pruned, refitted) = compensated(model, normal(20, 3, 8, 8, dtype=torch.float64), {"0": [0, 3]})
    assert refused == {} and error(pruned, whole) > 0.1 and error(refitted, whole) < 1e-3


def test_a_batch_norm_behind_takes_the_offset_of_a_layer_without_a_bias():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5)]
    model, x = randomised(nn.Sequential(*layers)).double(), normal(20, 3, 8, 8, dtype=torch.float64)
    small, _, (whole, pruned, refitted) = compensated(model, x, {"0": [1]}, "mean")
    assert torch.allclose(refitted.mean((0, 2, 3)), whole.mean((0, 2, 3)), atol=0.05)
    assert not torch.allclose(pruned.mean((0, 2, 3)), whole.mean((0, 2, 3)), atol=0.05)
    assert torch.equal(small[2].weight, model[2].weight[:, [0, 2, 3]]), "weights stay"


def test_the_end_of_a_residual_block_makes_up_for_what_the_shortcut_lost():
    model, x = randomised(DigitNet(3)).double(), images(40, channels=1)[0].double()
    names = {"blocks.0.conv1": [0], "blocks.1.conv1": [0, 1], "blocks.2.conv1": [0, 2, 3]}
    _, refused, (whole, pruned, refitted) = compensated(model, x, names)
    assert refused == {} and error(refitted, whole) < 0.6 * error(pruned, whole)


def test_little_memory_means_fewer_equations_and_less_at_a_time():
    torch.manual_seed(0)
    make, shape = LAYERS["conv"]
    model, x = make().double(), normal(*shape, dtype=torch.float64)
    _, _, (whole, pruned, refitted) = compensated(model, x, {"0": [0, 5, 2]}, memory=1 << 17)
    assert error(refitted, whole) < 0.5 * error(pruned, whole)


REFUSED = {
    "by itself": (lambda self, x: self.b(self.b(self.a(x)).relu()), {}, "reads what it has written itself"),
    "frozen": (lambda self, x: self.b(self.a(x)), {"freeze": "b"}, "is not to be trained"),
}


@pytest.mark.parametrize(("wiring", "options", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_refitted_stays_and_says_why(wiring, options, reason, caplog):
    caplog.set_level(logging.INFO, "singe")
    model = Wired(wiring, a=nn.Linear(3, 6), b=nn.Linear(6, 6))
    if "freeze" in options:
        model.b.requires_grad_(False)
    _, refused, (_, pruned, after) = compensated(model, normal(10, 3), {"a": [1, 2]})
    ((reader, why),) = refused.items()
    assert reason in why and torch.equal(pruned, after)
    assert f"{reader} is not refitted: {why}" in caplog.messages


def test_without_a_bias_there_is_no_mean_to_move():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    _, refused, (_, pruned, after) = compensated(model, normal(10, 3), {"0": [1]}, "mean")
    assert list(refused) == ["2"] and "no bias" in refused["2"] and torch.equal(pruned, after)
    _, refused, (whole, pruned, after) = compensated(model, normal(10, 3), {"0": [1]})
    assert refused == {} and error(after, whole) < error(pruned, whole)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_pruned_network_is_closer_to_the_unpruned_one(layout):
    model = randomised(PlainNet()).to(memory_format=layout)
    x, y = images(96)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    def prune(how):
        return singe.prune(
            model, loader, 0.3, criterion="magnitude", finetune=None, images=32, progress=False, compensate=how,
            compensation_images=96,
        )  # fmt: skip

    results = {how: prune(how) for how in ("none", "mean", "least_squares")}
    errors = {how: error(r.model(x), model.eval()(x)) for how, r in results.items()}
    assert errors["least_squares"] < errors["mean"] < errors["none"]
    assert all(r.uncompensated == {} for r in results["least_squares"].history)


def test_a_network_of_a_fixed_batch_is_fed_whole_batches():
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.reshape(8, 3, 8, 8))

    x, y = images(64)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4)]
    result = singe.prune(
        randomised(Fixed(*layers)), loader, 0.3, criterion="magnitude", finetune=None, images=8, progress=False,
        compensate="least_squares", compensation_images=20,
    )  # fmt: skip
    assert result.plan.removals and all(r.uncompensated == {} for r in result.history)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"compensate": "ridge"}, "got 'ridge'"), ({"compensate": "mean", "compensation_images": 1}, ">= 2, got 1")],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        singe.prune(nn.Linear(2, 2), [], 0.5, **options)


def test_a_batch_norm_that_puts_out_a_constant_asks_for_nothing():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    model = randomised(nn.Sequential(*layers))
    with torch.no_grad():
        model[3].weight[2] = 0
    small, _, (whole, pruned, after) = compensated(model, normal(20, 3, 8, 8), {"0": [1]})
    assert all(p.isfinite().all() for p in small.parameters())
    assert F.mse_loss(after, whole) < F.mse_loss(pruned, whole)
    assert torch.allclose(small[2].weight[2], model[2].weight[2, [0, 2, 3]], atol=1e-4)


@pytest.mark.parametrize("when", ["layer", "after"])
def test_where_a_network_is_trained_in_between_it_goes_on_as_it_was_before_the_group(when, monkeypatch):
    seen = []

    class Watched(Compensator):
        def refit(self, model, trace, group):
            seen.append((self._wanted._model, len(self._wanted.plan.removals), copy.deepcopy(model)))
            return super().refit(model, trace, group)

    monkeypatch.setattr("singe.runs.group.Compensator", Watched)
    model = randomised(PlainNet())
    x, y = images(64)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    singe.prune(
        model, loader, 0.4, criterion="magnitude", finetune=singe.FineTune(4, when=when), images=32, progress=False,
        allocation="uniform", compensate="least_squares", compensation_images=64,
    )  # fmt: skip
    assert len(seen) > 1
    for done, (reference, groups, work) in enumerate(seen):
        assert groups == (1 if when == "layer" else done + 1)
        width = sum(p.numel() for p in reference.parameters())
        assert (reference is model) == (when == "after")
        assert width > sum(p.numel() for p in work.parameters())
        if when == "layer" and done:
            assert width < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_a_refitted_layer_does_the_same_in_train_mode(bias):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6), nn.ReLU()]
    model = nn.Sequential(*layers).double()
    x = normal(60, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        y = model[:3](x)
        model[3].running_mean[:], model[3].running_var[:] = y.mean((0, 2, 3)), y.var((0, 2, 3))
    small, refused, (whole, _, refitted) = compensated(model, x, {"0": [0, 1, 5]})
    trained = copy.deepcopy(small).train()(x)
    assert refused == {} and error(trained, refitted) < 0.02 * error(refitted, whole)


@pytest.mark.parametrize(("samples", "trained"), [(200, False), (20, True)], ids=["not to be trained", "few equations"])
def test_scales_that_are_not_to_be_trained_or_of_few_samples_stay(samples, trained):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4))
    model[3].requires_grad_(trained)
    small, refused, (whole, pruned, refitted) = compensated(model, normal(samples, 3), {"0": [0, 5]})
    assert refused == {} and error(refitted, whole) < error(pruned, whole)
    assert torch.equal(small[3].weight, model[3].weight) and torch.equal(small[3].bias, model[3].bias)
    assert torch.equal(small[3].running_var, model[3].running_var)


# -- all layers ------------------------------------------------------------------------------------------------


def pruned_twice(model, x):
    """A network with two pruned groups whose readers are refitted, its trace, and what refits all of it."""
    graph, plan = trace(model.eval(), x), Plan()
    groups = [g for g in find_groups(graph) if g.frozen is None and g.name != "stem"][:2]
    for group in groups:
        plan.add(group, range(group.size // 2))
    small = plan.apply(copy.deepcopy(model))
    helper = Compensator(Wanted(model, graph, (x, None), Task(), 1 << 30, plan), "least_squares")
    for group in groups:
        helper.refit(small, trace(small, x), group)
    return small, trace(small, x), helper


def test_refitting_all_layers_comes_closer_than_readers_alone_and_leaves_what_lies_in_front():
    model, x = randomised(DigitNet(8)), images(320, channels=1)[0]
    small, graph, helper = pruned_twice(model, x)
    wanted, before, front = model(x), small(x), copy.deepcopy(small.stem.state_dict())
    refused = helper.refit_all(small, graph)
    after = small(x)
    assert not refused
    assert F.mse_loss(after, wanted) < 0.7 * F.mse_loss(before, wanted)
    assert all(torch.equal(value, front[name]) for name, value in small.stem.state_dict().items())


def test_layers_with_hardly_more_equations_than_unknowns_stay_and_are_named():
    model, x = randomised(DigitNet(8)), images(320, channels=1)[0]
    small, graph, helper = pruned_twice(model, x)
    before = small.head.weight.clone()
    wanted = Wanted(model, trace(model, x), (x[:40], None), Task(), 1 << 30, helper._wanted.plan)
    few = Compensator(wanted, "least_squares")
    assert few.refit_all(small, graph)["head"] == "40 equations are too few for 32 unknowns: under 4 for each"
    assert torch.equal(small.head.weight, before)
    assert helper.refit_all(small, graph) == {} and not torch.equal(small.head.weight, before)


def test_layers_behind_a_tensor_are_found_in_order():
    model, x = randomised(PlainNet()), images(2)[0]
    assert reached(trace(model, x), {"features.4.weight"}) == [
        "features.4.weight", "features.7.weight", "classifier.0.weight", "classifier.3.weight"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1), ({"finetune": singe.FineTune(2, when="layer")}, 0), ({"compensate": "mean"}, 0)],
    ids=["least squares", "entwined", "mean"],
)
def test_all_layers_are_refitted_behind_the_last_group_unless_training_led_away(options, expected, monkeypatch):
    seen = []

    class Watched(Compensator):
        def refit_all(self, model, trace):
            seen.append(len(self._wanted.plan.removals))
            return super().refit_all(model, trace) | {"layer": "too odd"}

    monkeypatch.setattr("singe.runs.neurons.Compensator", Watched)
    x, y = images(64)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    quick = {"criterion": "magnitude", "finetune": None, "images": 32, "progress": False, "allocation": "uniform"}
    result = singe.prune(randomised(PlainNet()), loader, 0.4, **quick | {"compensation_images": 64} | options)
    assert seen == [len(result.plan.removals)] * expected
    assert ("layer" in result.uncompensated) == bool(expected)


class Sharing(nn.Module):
    """b reads a; c does not, but has b's bias or batch norm."""

    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5, what == "bias"), nn.Linear(6, 5, what == "bias")
        self.norm, self.end = nn.BatchNorm1d(5) if what == "norm" else nn.Identity(), nn.Linear(10, 4)
        self.other = self.norm
        if what == "bias":
            self.c.bias = self.b.bias
        if what == "scale":
            self.norm, self.other = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
            self.other.weight, self.other.bias = self.norm.weight, self.norm.bias

    def forward(self, x):
        return self.end(torch.cat([self.norm(self.b(self.a(x).relu())), self.other(self.c(x))], 1))


@pytest.mark.parametrize("how", ["mean", "least_squares"])
@pytest.mark.parametrize("what", ["bias", "norm", "scale"])
def test_what_another_layer_uses_too_stays(what, how):
    model, x = randomised(Sharing(what)).double(), normal(60, 6, dtype=torch.float64)
    with torch.no_grad():
        model.a.weight[0], model.a.bias[0] = 0, 1  # a constant, which only an offset makes up for
    small, refused, (whole, pruned, refitted) = compensated(model, x, {"a": [0, 3]}, how)
    assert torch.equal(small.other(small.c(x)), model.other(model.c(x)))
    if how == "mean" and what == "scale":
        assert refused == {} and error(refitted, whole) < error(pruned, whole)  # by its own running mean
    elif how == "mean":
        assert "no bias of its own to change, and no batch norm of its own" in refused["b"]
        assert torch.equal(refitted, pruned)
    else:
        assert refused == {} and error(refitted, whole) < error(pruned, whole)


@pytest.mark.parametrize("how", ["mean", "least_squares"])
def test_an_expert_that_no_sample_reaches_is_not_refitted(how):
    model, x = Experts().double(), normal(200, 6, dtype=torch.float64)
    gone = {f"experts.{number}.0": [0, 3, 4] for number in range(3)}
    small, refused, (whole, pruned, refitted) = compensated(model, x, gone, how)
    assert refused == {"experts.2.2": "no samples reach it"}
    assert torch.equal(small.experts[2][2].bias, model.experts[2][2].bias)
    assert error(refitted, whole) < error(pruned, whole)


def test_parts_of_the_images_of_which_none_reaches_an_expert_change_nothing():
    model, x = Experts().double(), normal(40, 6, dtype=torch.float64)
    x = x[model.gate(model.stem(model.front(x).relu()).relu()).argmax(1).argsort()]
    gone = {"experts.0.0": [1], "experts.1.0": [0, 5]}
    answers = [compensated(model, x, gone, memory=memory)[2][-1] for memory in (1 << 30, 12_000)]
    torch.testing.assert_close(*answers, rtol=1e-9, atol=1e-9)


def test_an_expert_that_other_samples_reach_once_layers_before_it_are_pruned_is_not_refitted():
    model, x = Experts().double(), normal(200, 6, dtype=torch.float64)
    _, refused, _ = compensated(model, x, {"front": [0, 1, 2], "experts.0.0": [0]})
    assert refused == {"experts.0.2": "other samples reach it than in the network that it is to be like"}
