from functools import partial, wraps

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from wiring import Attention

import singe
from singe.models.copies import copy_of, forget_passes


class Keeps(nn.Module):
    """Holds on to what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 2), None

    def forward(self, x):
        self.last = self.layer(x)
        return self.last.relu()


def test_what_a_forward_pass_left_behind_is_copied_without_its_history():
    model = Keeps()
    model(torch.randn(4, 3))
    copied = copy_of(model)
    assert torch.equal(copied.last, model.last) and copied.last is not model.last
    assert copied.last.grad_fn is None and model.last.grad_fn is not None
    assert copied.layer.weight is not model.layer.weight


@pytest.mark.parametrize("kept", [lambda h: [h], lambda h: (1, {"h": h}), lambda h: {"a": {"b": [h]}}])
def test_also_in_lists_tuples_and_dicts(kept):
    model = Keeps()
    model(torch.randn(4, 3))
    model.last, expected = kept(model.last), model.last
    (copied,) = (t for t in pytree.tree_leaves(copy_of(model).last) if isinstance(t, torch.Tensor))
    assert torch.equal(copied, expected) and copied.grad_fn is None and expected.grad_fn is not None


@pytest.mark.parametrize("when", ["after", "layer"])
def test_a_network_that_keeps_its_features_in_a_list_is_pruned_and_trained(when):
    class Features(nn.Sequential):
        def forward(self, x):
            self.seen = []
            for layer in self:
                x = layer(x)
                self.seen.append(x)
            return x

    torch.manual_seed(0)
    model = Features(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    batch = torch.randn(32, 6), torch.randint(4, (32,))
    result = singe.prune(model, [batch], 0.3, images=8, finetune=singe.FineTune(4, when=when), progress=False)
    assert result.params_removed > 0.2


class Shared(nn.Linear):
    """Is its own copy, as of a backbone that all copies of a model are to share."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    "call", [singe.inspect, singe.fold_batchnorm, lambda m, x: singe.prune(m, [(x, x[:, 0].long())], 0.3)]
)
def test_a_module_that_copies_share_is_refused_before_it_is_touched(call):
    model = nn.Sequential(Shared(3, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the copy shares 0\.weight, 0\.bias with it"):
        call(model, torch.rand(4, 3))
    assert model[0].out_features == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_copy_may_share_some_tensors():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    copied = copy_of(model, [model[0].weight, model[1].running_mean])
    assert copied[0].weight is model[0].weight and copied[1].running_mean is model[1].running_mean
    assert copied[0].bias is not model[0].bias and torch.equal(copied[0].bias, model[0].bias)


class CachedBias(Attention):
    """Computes its position biases in eval mode once, as LeViT's attention does; ``train`` drops them."""

    def __init__(self):
        super().__init__(True, False)
        self.bias, self.kept = nn.Parameter(torch.randn(3, 7)), {}

    def train(self, mode=True):
        if mode:
            self.kept = {}
        return super().train(mode)

    def biases(self):
        if self.training:
            return self.bias[:, None]
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[:, None]
        return self.kept["bias"]

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT + self.biases()).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_what_a_network_keeps_of_its_weights_between_passes_is_not_pruned_around(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(CachedBias(), nn.Flatten(), nn.Linear(35, 3)).eval(), torch.randn(8, 7, 5)
    model(x)
    batch = x, torch.arange(8) % 3
    tuning = singe.FineTune(steps=8, lr=0.1)
    result = singe.prune(
        model, [batch], 0.2, criterion="magnitude", images=8, compensation_images=8, finetune=tuning, progress=False
    )
    assert [r.group for r in result.history] == ["0.qkv"] and model[0].kept["bias"].shape == (3, 1, 7)
    answer = result.model(x)
    result.model.train().eval()
    assert torch.equal(result.model(x), answer)
    result.save(tmp_path)
    with torch.no_grad():
        model[0].bias.zero_()
    assert torch.equal(singe.load(model, tmp_path)(x), answer)


class Untrainable(CachedBias):
    def train(self, mode=True):
        if mode:
            raise RuntimeError("for inference only")
        return super().train(mode)


class BuiltForEval(nn.Linear):
    """Works in eval mode with what it computed when it was put there."""

    def train(self, mode=True):
        self.built = None if mode else self.weight.detach().clone()
        return super().train(mode)

    def forward(self, x):
        return nn.functional.linear(x, self.weight if self.training else self.built, self.bias)


def test_a_network_that_cannot_be_put_into_train_mode_is_copied_all_the_same():
    model = Untrainable().eval()
    assert not copy_of(model).training and not model.training


def test_modules_of_another_mode_than_the_rest_get_into_it_by_their_own_way():
    model = nn.Sequential(nn.Linear(3, 4), BuiltForEval(4, 2)).train()
    model[1].eval()
    x, before = torch.randn(5, 3), model[1].built
    with torch.no_grad():
        model[1].weight.mul_(2)
    forget_passes(model)
    assert [m.training for m in model] == [True, False] and torch.equal(model[1].built, 2 * before)
    model(x)


class Watched(nn.Module):
    """Its head reads what a hook keeps of the first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(14, 2)
        self.kept = {}

    def keep(self, module, args, out):
        self.kept["first"] = out

    def forward(self, x):
        y = self.second(self.first(x).relu()).relu()
        return self.head(torch.cat([self.kept["first"], y], 1))


def logged(function):
    @wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def captured(model):
    return lambda module, args, out: model.kept.update(first=out)


def defaulted(model):
    return lambda module, args, out, model=model: model.keep(module, args, out)


def of_a_partial(model):
    return partial(lambda kept, module, args, out: model.kept.update(first=out), 1)


def of_a_method(model):
    keep = model.keep
    return lambda *given: keep(*given)


def decorated(model):
    return logged(model.keep)


def read_globally(model):
    globals()["watched"] = model
    return lambda module, args, out: watched.keep(module, args, out)  # noqa: F821


HOLDING = [captured, defaulted, of_a_partial, of_a_method, decorated, read_globally]


@pytest.mark.parametrize("hook", HOLDING)
def test_a_hook_that_holds_the_model_is_refused(hook):
    model = Watched()
    model.first.register_forward_hook(hook(model))
    with pytest.raises(ValueError, match=r"a forward hook of first holds the model itself, .* bound method"):
        copy_of(model)


@pytest.mark.parametrize(
    "call",
    [singe.inspect, singe.fold_batchnorm, lambda m, x: singe.prune(m, [(x, x[:, 0].long())], 0.3)],
    ids=["inspect", "fold_batchnorm", "prune"],
)
def test_all_calls_refuse_it_before_any_work(call):
    model = Watched().eval()
    model.second.register_forward_pre_hook(lambda module, args: model.first.register_buffer("seen", args[0]))
    model.first.register_forward_hook(model.keep)
    with pytest.raises(ValueError, match="expected a model whose copies work on themselves, but a forward hook of sec"):
        call(model, torch.rand(4, 3))
    assert model.kept == {}


def by_method(model):
    return model.keep


def by_partial(model):
    return partial(Watched.keep, model)


def by_what_it_is_given(model):
    first = []  # of a list nobody knows what it is for
    return lambda module, args, out: first.append(out)


@pytest.mark.parametrize("hook", [by_method, by_partial, by_what_it_is_given])
def test_hooks_that_are_copied_with_the_model_or_hold_something_else_stay(hook):
    model = Watched()
    model.first.register_forward_hook(hook(model))
    copied = copy_of(model)
    copied.first(torch.rand(4, 3))
    assert model.kept == {} and bool(copied.kept) == (hook is not by_what_it_is_given)
