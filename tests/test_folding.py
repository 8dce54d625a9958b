import copy
import logging
import math

import pytest
import torch
from networks import DigitNet, PlainNet, images, randomised
from states import random_states, same, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from wiring import Wired, normal

import singe


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def settled(model, seed=4):
    """Batch norms of every rank with statistics away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(model).values():
        if norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model.eval()


def error(actual, expected):
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def folded(model, x, **options):
    """The folding, after a look at what holds for every one of them."""
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        folding = singe.fold_batchnorm(model, x, **options)
        actual = copy.deepcopy(folding.model).eval()(x)
    assert type(folding.model) is type(model)
    assert sorted([*folding.folded, *folding.unfolded]) == sorted(norms(model))
    assert set(norms(folding.model)) == set(folding.unfolded)
    assert all(type(folding.model.get_submodule(name)) is nn.Identity for name in folding.folded)
    assert error(actual, expected) < {torch.float64: 1e-12, torch.float32: 1e-4}.get(x.dtype, 3e-2)
    return folding


# -- what folds --------------------------------------------------------------------------------------------------

PAIRS = [("biased", "n1"), ("bare", "n2"), ("grouped", "n3"), ("deep", "n4"), ("line", "n5"), ("space", "n6"),
         ("flat", "n7")]  # fmt: skip


def every_kind():
    """Each kind of layer that a batch norm can be folded into, with and without bias."""

    def wiring(self, x):
        y = self.n2(self.bare(self.n1(self.biased(x)).relu())).relu()
        y = self.n4(self.deep(self.n3(self.grouped(y)).relu())).relu()
        line = self.n5(self.line(y.flatten(2))).tanh().mean(2)
        space = self.n6(self.space(y[:, :, None])).tanh().mean((2, 3, 4))
        return self.head(self.n7(self.flat(torch.cat([line, space], 1))).relu())

    return settled(Wired(
        wiring,
        biased=nn.Conv2d(3, 6, 3, stride=2, padding=1), n1=nn.BatchNorm2d(6),
        bare=nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular", bias=False),
        n2=nn.BatchNorm2d(6, affine=False, eps=0.1),
        grouped=nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), n3=nn.BatchNorm2d(4),
        deep=nn.Conv2d(4, 8, 3, padding=1, groups=4), n4=nn.BatchNorm2d(8, momentum=None),
        line=nn.Conv1d(8, 3, 5, bias=False), n5=nn.BatchNorm1d(3),
        space=nn.Conv3d(8, 4, (1, 2, 2)), n6=nn.BatchNorm3d(4),
        flat=nn.Linear(7, 5, bias=False), n7=nn.BatchNorm1d(5), head=nn.Linear(5, 4),
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_stay_the_same_and_weights_are_those_of_the_formula(dtype):
    model = every_kind().to(dtype)
    folding = folded(model, images()[0].to(dtype))
    assert folding.folded == tuple(norm for _, norm in PAIRS) and folding.unfolded == {}
    for name, norm in PAIRS:
        layer, bn, new = model.get_submodule(name), model.get_submodule(norm), folding.model.get_submodule(name)
        a = (bn.running_var.double() + bn.eps) ** -0.5 * (bn.weight.double() if bn.affine else 1)
        bias = 0 if layer.bias is None else layer.bias.double()
        shift = a * (bias - bn.running_mean.double()) + (bn.bias.double() if bn.affine else 0)
        weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.dim() - 1))
        assert new.weight.dtype == new.bias.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        assert error(new.weight, weight) < tolerance and error(new.bias, shift) < 4 * tolerance, name


def test_a_folded_network_exports_trains_and_answers_alike_for_other_inputs():
    model = settled(randomised(DigitNet(3)).double())
    folding = folded(model, images(2, channels=1)[0].double())
    assert len(folding.folded) == len(norms(model)) == 9
    x, y = images(7, channels=1, seed=6)
    x = x.double()
    program = torch.export.export(folding.model, (x,)).module()
    for network in (folding.model, program):
        assert error(network(x), model(x)) < 1e-12
    F.cross_entropy(folding.model(x), y).backward()
    assert all(p.grad.isfinite().all() for p in folding.model.parameters())


def test_a_network_without_batch_norm_is_only_copied():
    model = Wired(lambda self, x: self.a(x).relu(), a=nn.Linear(4, 3))
    folding = folded(model, normal(2, 4))
    assert (folding.folded, folding.unfolded) == ((), {})
    assert folding.model is not model and same(folding.model.state_dict(), model.state_dict())


# -- what does not -----------------------------------------------------------------------------------------------


class Obstacles(nn.Module):
    """One batch norm that folds among all that do not."""

    def __init__(self):
        super().__init__()
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        self.at_the_input = norm(3)
        self.good, self.folds = conv(3, 4, 3, padding=1), norm(4)
        self.behind_a_norm, self.behind_relu = norm(4), norm(4)
        self.read, self.beside_a_reader, self.behind_a_sum = conv(4, 4, 1), norm(4), norm(4)
        self.one, self.other, self.called_twice = conv(4, 4, 1), conv(4, 4, 1), norm(4)
        self.shared, self.first_of_shared, self.second_of_shared = conv(4, 4, 1), norm(4), norm(4)
        self.tied, self.tie, self.first_of_tied, self.second_of_tied = conv(4, 4, 1), conv(4, 4, 1), norm(4), norm(4)
        self.tie.weight = self.tied.weight
        self.x, self.without_statistics = conv(4, 4, 1), norm(4, track_running_stats=False)
        self.y, self.only_in_training, self.never_called = conv(4, 4, 1), norm(4), norm(4)
        self.computed = nn.utils.parametrizations.weight_norm(conv(4, 4, 1))
        self.behind_a_computed_weight = norm(4)
        self.weight, self.behind_a_parameter = nn.Parameter(torch.randn(4, 4, 1, 1)), norm(4)
        self.steps, self.over_time = nn.Linear(8, 8), nn.BatchNorm1d(32)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.folds(self.good(self.at_the_input(x)))
        x = self.behind_relu(self.behind_a_norm(x).relu())
        z = self.read(x)
        x = self.behind_a_sum(self.beside_a_reader(z) + z.tanh())
        x = self.called_twice(self.one(x)).relu() + self.called_twice(self.other(x)).relu()
        x = self.first_of_shared(self.shared(x)).relu() + self.second_of_shared(self.shared(x * 2)).relu()
        x = self.first_of_tied(self.tied(x)).relu() + self.second_of_tied(self.tie(x * 2)).relu()
        x = self.without_statistics(self.x(x)).relu()
        y = self.y(x)
        x = self.only_in_training(y) if self.training else y
        x = self.behind_a_computed_weight(self.computed(x)).relu()
        x = self.behind_a_parameter(F.conv2d(x, self.weight)).relu()
        return self.head(self.over_time(self.steps(x.flatten(1, 2))).mean(1))


REASONS = {
    "at_the_input": "stands behind the input",
    "behind_a_norm": "stands behind aten.batch_norm",
    "behind_relu": "stands behind aten.relu",
    "beside_a_reader": "read by others too",
    "behind_a_sum": "stands behind aten.add",
    "called_twice": "used 2 times",
    "first_of_shared": "the layer before it is used more than once",
    "second_of_shared": "the layer before it is used more than once",
    "first_of_tied": "the layer before it is used more than once",
    "second_of_tied": "the layer before it is used more than once",
    "without_statistics": "not used with its own statistics in eval mode",
    "only_in_training": "not used with its own statistics in eval mode",
    "never_called": "not used with its own statistics in eval mode",
    "behind_a_computed_weight": "computed weight",
    "behind_a_parameter": "belongs to no convolution or linear module",
    "over_time": "normalised along another axis",
}


def test_what_stays_is_named_with_the_reason_and_logged_and_the_rest_folds_all_the_same(caplog):
    torch.manual_seed(0)
    model = settled(Obstacles().double())
    with caplog.at_level(logging.INFO, "singe"):
        folding = folded(model, images()[0].double())
    assert folding.folded == ("folds",)
    assert folding.unfolded.keys() == REASONS.keys()
    messages = [r.getMessage() for r in caplog.records if r.name == "singe"]
    for name, reason in REASONS.items():
        assert reason in folding.unfolded[name], name
        assert f"{name} is not folded: {folding.unfolded[name]}" in messages
    kept = {n: m.state_dict() for n, m in norms(model).items() if n != "folds"}
    assert same({n: m.state_dict() for n, m in norms(folding.model).items()}, kept)


def test_a_batch_norm_of_another_dtype_stays():
    model = settled(Wired(lambda self, x: self.n(self.a(x)), a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)).bfloat16())
    model.n.float()
    assert "another dtype" in folded(model, images()[0].bfloat16()).unfolded["n"]


@pytest.mark.parametrize(
    "wiring",
    [
        lambda self, x: self.n(self.a(x)) * self.n.weight.sum(),
        lambda self, x: F.batch_norm(self.a(x), self.n.running_mean, self.n.running_var, self.n.weight, self.n.bias),
        lambda self, x: self.n(self.a(x)) * (1 + isinstance(self.n, nn.BatchNorm2d)),
    ],
    ids=["reads its weight", "calls the function on its tensors", "asks for its class"],
)
def test_a_batch_norm_that_the_code_does_more_with_than_call_it_is_put_back(wiring):
    def whole(self, x):
        return wiring(self, self.first(self.conv(x)).relu())

    parts = {"conv": nn.Conv2d(3, 4, 3), "first": nn.BatchNorm2d(4), "a": nn.Conv2d(4, 5, 3), "n": nn.BatchNorm2d(5)}
    model = settled(Wired(whole, **parts).double())
    folding = folded(model, images()[0].double())
    assert folding.folded == ("first",)
    assert "more with it than call it" in folding.unfolded["n"]
    assert same(folding.model.a.state_dict(), model.a.state_dict())
    assert [n for n, _ in folding.model.named_parameters()] == [
        n for n, _ in model.named_parameters() if not n.startswith("first.")
    ]


class Clamped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-50, 50)


@pytest.mark.parametrize("how", ["subclass", "hook"])
def test_what_is_done_beside_normalising_is_kept_even_where_the_example_does_not_show_it(how):
    norm = Clamped(4) if how == "subclass" else nn.BatchNorm2d(4)
    if how == "hook":
        norm.register_forward_hook(lambda module, x, y: y.clamp(-50, 50))
    model, x = settled(Wired(lambda self, x: self.n(self.a(x)), a=nn.Conv2d(3, 4, 3), n=norm)), images()[0]
    folding = singe.fold_batchnorm(model, x)
    assert model(1e4 * x).abs().max() == 50
    assert error(folding.model(1e4 * x), model(1e4 * x)) < 1e-4


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_batch_norm_with_two_names_folds_under_both(name):
    model = Wired(lambda self, x: getattr(self, name)(self.a(x)), a=nn.Conv2d(3, 4, 3), first=nn.BatchNorm2d(4))
    model.second = model.first
    folding = folded(settled(model), images()[0])
    assert folding.folded == ("first",)
    assert not norms(folding.model)


# -- promises ----------------------------------------------------------------------------------------------------


class InPlace(PlainNet):
    def forward(self, x):
        return super().forward(x.mul_(2))


def test_the_network_its_modes_the_example_and_the_random_state_are_as_before():
    model, (x, y) = randomised(InPlace()), images()
    F.cross_entropy(model(x.clone()), y).backward()
    model.train()
    model.features[1].eval()
    model.features[0].requires_grad_(False)
    before, state, example = snapshot(model), random_states(), x.clone()
    folding = singe.fold_batchnorm(model, x.requires_grad_())
    assert same(snapshot(model), before) and same(random_states(), state)
    assert torch.equal(x, example) and x.grad is None
    assert [(n, m.training) for n, m in folding.model.named_modules()] == [
        (n, m.training) for n, m in model.named_modules()
    ]
    assert type(folding.model.features[1]) is nn.Identity and not folding.model.features[1].training
    trained = {n: p.requires_grad for n, p in folding.model.named_parameters()}
    frozen = {"features.0.weight", "features.0.bias"}
    assert {n for n, needed in trained.items() if not needed} == frozen
    assert "features.4.bias" in trained  # born of a batch norm
    shared = {p.data_ptr() for p in folding.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def test_folded_networks_prune_and_pruned_ones_fold():
    model, batch = randomised(PlainNet()), images(8)
    options = {"finetune": None, "images": 8, "progress": False, "criterion": "magnitude"}
    pruned = singe.prune(model, [batch], 0.4, **options).model
    folding = folded(pruned, batch[0])
    assert folding.folded == ("features.1", "features.5")
    again = singe.prune(folded(model, batch[0]).model, [batch], 0.4, **options)
    assert again.params_removed == pytest.approx(0.4, abs=0.02)
    assert [m.shape for m in again.model.parameters()] == [m.shape for m in folding.model.parameters()]


def test_a_network_that_takes_more_than_a_tensor_folds_with_forward():
    def wiring(self, pair):
        return self.n(self.a(pair["x"])).relu() + pair["shift"]

    class Named(Wired):
        def forward(self, x, shift):
            return wiring(self, {"x": x, "shift": shift})

    model = settled(Named(wiring, a=nn.Linear(4, 5), n=nn.BatchNorm1d(5)).double())
    example = {"late": normal(3, 5, dtype=torch.float64), "early": normal(3, 4, seed=8, dtype=torch.float64)}

    def forward(network, batch):
        return network(batch["early"], shift=batch["late"])

    folding = singe.fold_batchnorm(model, example, forward=forward)
    assert folding.folded == ("n",)
    assert error(forward(folding.model, example), forward(model, example)) < 1e-12


X = images()[0]


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        (X * math.nan, ValueError, "NaN"),
        (X.clone().fill_(math.inf), ValueError, "infinity"),
        (X[:, :2], ValueError, r"fit PlainNet.*\(5, 2, 8, 8\)"),
        (X.double(), ValueError, r"fit PlainNet.*float64"),
        (images(), TypeError, "tensor x, got tuple"),
        (X[:0], ValueError, r"length, at least 1, got \(\(0, 3, 8, 8\)"),
        (torch.tensor(1.0), ValueError, "length, at least 1"),
        (X.numpy(), TypeError, "tensor x, got ndarray"),
        (None, TypeError, "tensor x, got NoneType"),
        ([], TypeError, "tensor x, got list"),
    ],
    ids=["nan", "inf", "channels", "dtype", "pair", "empty", "scalar", "numpy", "None", "list"],
)
def test_an_example_that_is_none_is_refused(example, kind, message):
    with pytest.raises(kind, match=message):
        singe.fold_batchnorm(randomised(PlainNet()), example)


def test_what_is_no_sound_network_is_refused():
    broken = randomised(PlainNet())
    broken.features[5].running_var[2] = math.nan
    for model, kind, message in [
        ("PlainNet", TypeError, r"Module, got str"),
        (PlainNet, TypeError, r"Module, got type"),
        (nn.ReLU(), ValueError, "no parameters"),
        (broken, ValueError, r"NaN in features\.5\.running_var"),
    ]:
        with pytest.raises(kind, match=message):
            singe.fold_batchnorm(model, X)
