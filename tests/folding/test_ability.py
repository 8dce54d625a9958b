"""What stays unfolded, and why."""

import copy
import logging

import pytest
import torch
from beside import Beside, without_place
from folds import conv, double, error, folded, norm, norms, settled
from networks import images
from states import same
from torch import nn
from torch.nn import functional as F
from wiring import Wired

import singe


class Obstacles(nn.Module):
    """One batch norm that folds among all that do not."""

    def __init__(self):
        super().__init__()
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        self.at_the_input = norm(3)
        self.good, self.folds = conv(3, 4, 3, padding=1), norm(4)
        self.behind_relu, self.after, self.before_padding = norm(4), conv(4, 4, 3, padding=1), norm(4)
        self.padded, self.read, self.beside_a_reader = conv(4, 4, 3, padding="same"), conv(4, 4, 1), norm(4)
        self.one, self.called_twice = conv(4, 4, 1), norm(4)
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
        x = self.after(self.behind_relu(x.relu()))
        x = self.padded(self.before_padding(x.relu()))
        z = self.read(x)
        x = (self.beside_a_reader(z) + z.tanh()).relu()
        x = self.called_twice(self.one(x)).relu() + self.called_twice(x).relu()
        x = self.first_of_shared(self.shared(x)).relu() + self.second_of_shared(self.shared(x * 2)).relu()
        x = self.first_of_tied(self.tied(x)).relu() + self.second_of_tied(self.tie(x * 2)).relu()
        x = self.without_statistics(self.x(x)).relu()
        y = self.y(x)
        x = self.only_in_training(y) if self.training else y
        x = self.behind_a_computed_weight(self.computed(x)).relu()
        x = self.behind_a_parameter(F.conv2d(x, self.weight)).relu()
        return self.head(self.over_time(self.steps(x.flatten(1, 2))).mean(1))


REASONS = {
    "at_the_input": "before it comes the network's input; after it comes the zero padding of good",
    "behind_relu": "before it comes aten.relu.default; after it comes the zero padding of after",
    "before_padding": "before it comes aten.relu.default; after it comes the zero padding of padded",
    "beside_a_reader": "before it comes aten.tanh.default; after it comes aten.tanh.default",
    "called_twice": "before it comes aten.relu.default; after it comes aten.relu.default",
    "first_of_shared": "before it comes shared, which is used 2 times; after it comes aten.relu.default",
    "second_of_shared": "before it comes shared, which is used 2 times",
    "first_of_tied": "before it comes tied, whose weight or bias is tied to another's",
    "second_of_tied": "before it comes tied, whose weight or bias is tied to another's",
    "without_statistics": "has no statistics of its own",
    "only_in_training": "is not called in eval mode",
    "never_called": "is not called in eval mode",
    "behind_a_computed_weight": "before it comes aten.conv2d.default in computed, whose weight is computed",
    "behind_a_parameter": "before it comes weight, which belongs to no convolution, linear layer or batch norm",
    "over_time": "before it comes steps, for which its channels",
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


def hooked(layer):
    layer.register_forward_hook(lambda module, x, y: None)
    return layer


class Half(nn.Module):
    def forward(self, x):
        return x / 2


def parametrized(layer, name):
    nn.utils.parametrize.register_parametrization(layer, name, Half())
    return layer


OPEN = {
    "the network's output": (
        lambda self, x: (u := self.a(x), self.n(u)), {"a": conv(3, 4), "n": norm()},
        "before it comes the network's output; after it comes the network's output",
    ),
    "a constant factor": (
        lambda self, x: self.n(self.a(x) * torch.arange(8.0, dtype=x.dtype)).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes aten.mul.Tensor;",
    ),
    "a constant summand": (
        lambda self, x: self.n(self.a(x) + 1).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes aten.add.Tensor;",
    ),
    "another padding": (
        lambda self, x: self.n(F.pad(self.a(x), (1, 1), value=2)).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes aten.pad.default;",
    ),
    "maxima": (
        lambda self, x: self.n(F.max_pool2d(self.a(x), 2)).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes aten.max_pool2d.default;",
    ),
    "another dtype": (
        lambda self, x: self.n(self.a(x).float().double()).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes aten._to_copy.default;",
    ),
    "zeros around": (
        lambda self, x: self.n(F.pad(self.a(x), (1, 1))).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes zeros among its positions; after it comes aten.relu.default",
    ),
    "zeros beside": (
        lambda self, x: self.n(torch.cat([self.a(x), x.new_zeros(len(x), 1, 8, 8)], 1)).relu(),
        {"a": conv(3, 3), "n": norm()},
        "before it comes zeros;",
    ),
    "an average that counts padding": (
        lambda self, x: self.n(F.avg_pool2d(self.a(x), 3, 1, 1)).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes the divisor of aten.avg_pool2d.default;",
    ),
    "an average over another number": (
        lambda self, x: self.n(F.avg_pool2d(self.a(x), 2, divisor_override=3)).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes the divisor of aten.avg_pool2d.default;",
    ),
    "totals": (
        lambda self, x: self.n(self.a(x).sum(2, keepdim=True)).relu(), {"a": conv(3, 4), "n": norm()},
        "before it comes aten.sum.dim_IntList;",
    ),
    "a transposed convolution": (
        lambda self, x: self.a(self.n(x.relu())).relu(), {"n": norm(3), "a": nn.ConvTranspose2d(3, 4, 3)},
        "after it comes the border of a",
    ),
    "itself": (
        lambda self, x: self.b((u := self.a(x)) + self.n(u)), {"a": conv(3, 4), "n": norm(), "b": conv(4, 2)},
        "before it comes the batch norm itself; after it comes the batch norm itself",
    ),
    "root and leaf": (
        lambda self, x: self.n((u := self.a(x)) + self.b(u)).relu(), {"a": conv(3, 4), "b": conv(4, 4), "n": norm()},
        "before it comes b, which both reads and writes what would be scaled;",
    ),
    "repeated channels": (
        lambda self, x: self.n(self.a(x).repeat(1, 2, 1, 1)).relu(), {"a": conv(3, 2), "n": norm()},
        "before it comes a, for which its channels 0 and 2 are one;",
    ),
    "averaged channels": (
        lambda self, x: self.b(self.n(x.relu()).mean(1, keepdim=True)), {"n": norm(3), "b": conv(1, 2)},
        "after it comes b, for which its channels 0 and 1 are one",
    ),
    "a hook": (
        lambda self, x: self.n(self.a(x)).relu(), {"a": hooked(conv(3, 4)), "n": norm()},
        "before it comes a, which has forward hooks;",
    ),
    "a hook of its own": (
        lambda self, x: self.n(self.a(x)).relu(), {"a": conv(3, 4), "n": hooked(norm())}, "has forward hooks",
    ),
    "a computed bias": (
        lambda self, x: self.n(self.a(x)).relu(), {"a": parametrized(conv(3, 4), "bias"), "n": norm()},
        "before it comes a, whose bias is computed;",
    ),
    "a computed weight of its own": (
        lambda self, x: self.n(self.a(x)).relu(), {"a": conv(3, 4), "n": parametrized(norm(), "weight")},
        "has a computed weight or bias",
    ),
    "a batch norm that cannot change": (
        lambda self, x: self.n(self.m(x)).relu(), {"m": hooked(norm(3, affine=False)), "n": norm(3)},
        "before it comes aten.batch_norm.default in m, which has no weight and bias of its own;",
    ),
}  # fmt: skip


def test_an_obstacle_is_named():
    networks = {case: double(wiring, **copy.deepcopy(modules)) for case, (wiring, modules, _) in OPEN.items()}
    model = Beside(networks)
    folding = singe.fold_batchnorm(model, images()[0].double())
    for case, (_, _, reason) in OPEN.items():
        assert reason in without_place(case, folding.unfolded[f"networks.{case}.n"]), case
    assert same(folding.model.state_dict(), model.state_dict())


def test_the_size_of_a_batch_is_an_obstacle():
    model = double(lambda self, x: self.n(self.a(x) / x.shape[0]).relu(), a=conv(3, 4), n=norm())
    assert "before it comes aten.div.Tensor;" in folded(model, images()[0].double()).unfolded["n"]


def test_a_weight_that_the_training_mode_shares_stays():
    def wiring(self, x):
        return self.n(self.a(x)).relu() + (self.auxiliary(x) if self.training else 0)

    model = double(wiring, a=conv(3, 4), n=norm(), auxiliary=conv(3, 4))
    model.auxiliary.weight = model.a.weight
    assert "a, whose weight or bias is tied to another's;" in folded(model, images()[0].double()).unfolded["n"]


@pytest.mark.parametrize("scale", [0, 1e-30])
def test_a_scale_that_leaves_cannot_undo_stays(scale):
    model = Wired(
        lambda self, x: self.n(u := self.a(x)).relu() + self.b(u).relu(), a=conv(3, 4), n=norm(), b=conv(4, 4)
    )
    settled(model).n.weight.data[2] = scale
    reason = folded(model, images()[0]).unfolded["n"]
    if scale:
        assert reason == "the outputs change when it is folded: rounding is too coarse"
    else:
        assert reason.startswith("before it comes b, which would have to undo a scale of zero;")
    assert same(folded(model, images()[0]).model.state_dict(), model.state_dict())


class Chaos(nn.Module):
    def forward(self, x):
        for _ in range(9):
            x = 4 * x * (1 - x)
        return x


def test_a_network_that_amplifies_rounding_folds_all_the_same():
    model = settled(Wired(lambda self, x: Chaos()(self.n(self.a(x)).sigmoid()), a=conv(3, 4, 3), n=norm()))
    x = images()[0]
    folding = singe.fold_batchnorm(model, x)
    assert folding.folded == ("n",)
    gap = (folding.model(x) - model(x)).abs().max()
    assert 1e-5 < gap < 1e-2 and error(folding.model.a(x), model.n(model.a(x))) < 1e-6


def test_a_batch_norm_takes_in_others_from_either_side():
    def wiring(self, x):
        x = self.second(self.first(x)).relu()
        u = self.a(x)
        return self.third(u).relu() + self.fourth(u).tanh()

    model = double(wiring, first=norm(3), second=norm(3), a=conv(3, 4, 3, padding=1), third=norm(), fourth=norm())
    folding = folded(model, images()[0].double())
    assert folding.folded == ("first", "third")
    assert folding.unfolded == {
        "second": "before it comes the network's input; after it comes aten.relu.default",
        "fourth": "before it comes aten.relu.default; after it comes aten.tanh.default",
    }


def test_what_another_batch_norm_holds_up_folds_once_that_is_gone():
    def wiring(self, x):
        return self.late(self.early(self.a(x))).relu()

    model = double(wiring, late=norm(), early=norm(4, affine=False), a=conv(3, 4))
    assert folded(model, images()[0].double()).folded == ("late", "early")


def test_a_batch_norm_of_another_dtype_stays():
    model = settled(Wired(lambda self, x: self.n(self.a(x)), a=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(4)).bfloat16())
    model.n.float()
    assert folded(model, images()[0].bfloat16()).unfolded["n"] == "depends on a, which is of another dtype"


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


class NormAct(nn.BatchNorm2d):
    """A batch norm that brings its activations along, as some libraries have them."""

    def __init__(self, width):
        super().__init__(width)
        self.drop, self.act, self.limit = nn.Dropout(), nn.SiLU(), nn.Tanh()

    def forward(self, x):
        return self.limit(self.act(self.drop(super().forward(x))))


class Backwards(NormAct):
    def forward(self, x):
        return self.drop(self.act(self.limit(nn.BatchNorm2d.forward(self, x))))


class Negated(NormAct):
    def forward(self, x):
        return super().forward(x).neg()


def test_what_a_batch_norm_brings_along_stays_in_its_place():
    def wiring(self, x):
        return self.n(self.a(x)) + self.m(self.b(x)) + self.k(self.c(x))

    layers = {name: conv(3, 4) for name in "abc"}
    model = double(wiring, **layers, n=NormAct(4), m=Backwards(4), k=Negated(4))
    folding = folded(model.train(), images()[0].double())
    assert folding.folded == ("n",)
    assert folding.unfolded == {
        name: f"is a {kind}, which has a forward of its own" for name, kind in (("m", "Backwards"), ("k", "Negated"))
    }
    assert list(folding.model.n._modules) == ["drop", "act", "limit"]
    assert all(module.training for module in folding.model.n.modules())


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_batch_norm_with_two_names_folds_under_both(name):
    model = Wired(lambda self, x: getattr(self, name)(self.a(x)), a=nn.Conv2d(3, 4, 3), first=nn.BatchNorm2d(4))
    model.second = model.first
    folding = folded(settled(model), images()[0])
    assert folding.folded == ("first",)
    assert not norms(folding.model)
