import pytest
import torch
from networks import MLP, randomised
from states import same, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from wiring import Wired, normal

import singe
from singe.graph.trace import trace
from singe.scoring.own_gradients import check_own_gradients
from singe.task import Task


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Scaled(torch.autograd.Function):
    """Changes nothing but gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -0.1 * gradient


class Swish(torch.autograd.Function):
    """With its own gradient, for less memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * (s + x * s * (1 - s))


def network(between):
    def wiring(self, x):
        return self.c(between(self.b(self.a(x).relu())))

    return Wired(wiring, a=nn.Linear(10, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 4))


def batch():
    return normal(16, 10), torch.arange(16) % 4


def reentrant(x):
    return checkpoint(torch.tanh, x, use_reentrant=True)


FUNCTIONS = {"Rounded": Rounded.apply, "Scaled": Scaled.apply}


def behind_a_switch(x):
    with torch.no_grad():
        gate = x.sigmoid()
    return Swish.apply(x) * gate


TRUE = {"Swish": Swish.apply, "none": torch.tanh, "checkpoint": reentrant, "switch": behind_a_switch}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("how", ["prune", "score", "single weights", "gradual"])
def test_gradients_that_are_not_those_of_the_forward_pass_are_refused_by_name(name, how):
    model, few = network(FUNCTIONS[name]), batch()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"the backward pass of {name} gives others.*'magnitude'"):
        if how == "prune":
            singe.prune(model, [few], 0.3, images=16, progress=False)
        elif how == "score":
            singe.score(model, few, "a", criterion="gradient")
        elif how == "single weights":
            singe.prune(model, [few], 0.3, images=16, structured=False, criterion="integrated_gradient")
        else:
            pruner = singe.GradualPruner(model, few[0], every=1, per_round=2, until=1, criterion="gradient", images=16)
            pruner.epoch_end([few])
    assert same(snapshot(model), before)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("criterion", ["magnitude", "loss_change"])
def test_criteria_without_gradients_do_not_mind(name, criterion):
    model = network(FUNCTIONS[name])
    found = singe.score(model, batch(), "a", criterion=criterion)
    expected = singe.reference.score(model, batch(), "a", criterion=criterion)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", TRUE)
@pytest.mark.parametrize("fixed", [False, True])
def test_functions_with_the_true_gradient_are_taken(name, fixed):
    model = network(TRUE[name]).eval()
    model.a.requires_grad_(not fixed)
    model.b.weight.grad = None
    before = snapshot(model)
    check_own_gradients(model, trace(model, batch()[0]), batch(), Task())
    assert same(snapshot(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_small_part_of_the_gradient_counts():
    def wiring(self, x):
        return self.c(self.b(self.a(x).relu())) + 1e-3 * self.e(Rounded.apply(self.d(x)).relu())

    layers = {"a": (10, 8), "b": (8, 6), "c": (6, 4), "d": (10, 6), "e": (6, 4)}
    model = Wired(wiring, **{name: nn.Linear(*sizes) for name, sizes in layers.items()})
    with pytest.raises(ValueError, match="the backward pass of Rounded"):
        singe.score(model, batch(), "d")


def test_a_loss_may_draw_and_embeddings_may_be_sparse_and_hooks_see_nothing():
    def wiring(self, x):
        return self.a(Swish.apply(self.e(x)))

    seen = []
    model = Wired(wiring, e=nn.Embedding(10, 8, sparse=True), a=nn.Linear(8, 4)).eval()
    task = Task(loss=lambda o, b: nn.functional.cross_entropy(nn.functional.dropout(o, 0.5), b[1]))
    few = torch.arange(16) % 10, torch.arange(16) % 4
    check_own_gradients(model, trace(model, few[0]), few, task)
    hooked = network(torch.tanh).eval()
    hooked.b.register_full_backward_hook(lambda *given: seen.append(given))
    check_own_gradients(hooked, trace(hooked, batch()[0]), batch(), Task())
    assert not seen


def test_tied_weights_add_up():
    def wiring(self, x):
        return self.c(Swish.apply(self.b(self.a(x))))

    model = Wired(wiring, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 4)).eval()
    model.b.weight = model.a.weight
    check_own_gradients(model, trace(model, normal(16, 8)), (normal(16, 8), torch.arange(16) % 4), Task())


def test_a_loss_of_the_whole_batch_gets_it():
    def loss(outputs, given):
        return nn.functional.cross_entropy(outputs.view(17, 4), given[1])

    def wiring(self, x):
        return Rounded.apply(self.a(x))

    model, few = Wired(wiring, a=nn.Linear(10, 4)).eval(), (normal(17, 10), torch.arange(17) % 4)
    with pytest.raises(ValueError, match="the backward pass of Rounded"):
        check_own_gradients(model, trace(model, few[0]), few, Task(loss=loss))


def test_a_function_of_the_losss_own_is_part_of_it():
    few = batch()
    task = Task(loss=lambda outputs, given: Scaled.apply(nn.functional.cross_entropy(outputs, given[1])))
    model = randomised(MLP()).eval()
    check_own_gradients(model, trace(model, few[0]), few, task)


def shifted(self, x):
    """Channels see their neighbours' values, by assignment."""
    y = self.a(x)
    z = torch.zeros_like(y)
    z[..., 1:] = y[..., :-1]
    z[..., 0] = y[..., 1]
    z.diagonal(dim1=-2, dim2=-1).copy_(y[:, :, 2])
    whole = torch.empty_like(y)
    whole.copy_(y.mean((2, 3), keepdim=True))
    z = z + whole.view(len(z), -1).view_as(z)
    return self.b(z.relu()).mean((2, 3))


def test_what_is_written_into_tensors_is_differentiated():
    model = Wired(shifted, a=nn.Conv2d(3, 6, 3, padding=1), b=nn.Conv2d(6, 4, 1)).double().eval()
    batch = normal(5, 3, 6, 6, dtype=torch.float64), torch.arange(5) % 4
    for criterion in (singe.IntegratedGradient(), singe.LossChange()):
        found, expected = (f(model, batch, "a", criterion=criterion) for f in (singe.score, singe.reference.score))
        assert (found - expected).norm() <= 1e-9 * expected.norm() and expected.norm() > 0


def test_operators_without_a_derivative_do_not_matter_where_the_loss_does_not_depend_on_them():
    def wiring(self, x):
        y = self.b(self.a(x).relu())
        return y.mean((2, 3)), torch.native_channel_shuffle(y, 2)

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 4, 1)).eval()
    scores = singe.score(model, (normal(5, 3, 6, 6), torch.arange(5) % 4), "a", loss=lambda o, b: o[0].square().sum())
    assert scores.all()


def test_operators_without_a_derivative_are_refused_before_work():
    def shuffled(self, x):
        return self.c(torch.native_channel_shuffle(self.b(self.a(x)), 2)).mean((2, 3))

    model = Wired(shuffled, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 4, 1), c=nn.Conv2d(4, 3, 1)).eval()
    batch = normal(5, 3, 6, 6), torch.arange(5) % 3
    with pytest.raises(ValueError, match=r"can differentiate, got aten\.native_channel_shuffle\.default; take"):
        singe.prune(model, [batch], 0.3, images=5, progress=False)
