"""What holds for every function of the package: nothing of the caller's changes, and bad input is refused in words."""

import inspect
import itertools
import logging
import random
import re
import warnings
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from networks import MLP, PlainNet, images, randomised
from states import global_settings, random_states, same, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wiring import normal

import singe
from singe import FineTune


class NormMLP(MLP):
    """With batch norms, which train, are recalibrated and fold."""

    def __init__(self):
        super().__init__()
        self.layers.insert(3, nn.BatchNorm1d(9))
        self.layers.insert(1, nn.BatchNorm1d(12))


def mlp(kind=NormMLP):
    return randomised(kind())


def batch(count=16):
    return normal(count, 10), torch.arange(count) % 4


def prune(model, loader=None, **options):
    plain = {"allocation": "uniform", "compensate": "none", "images": 16, "recalibrate_bn": 16, "progress": False}
    options = {**plain, "finetune": FineTune(steps=2, when="layer"), **options}
    return singe.prune(model, [batch()] if loader is None else loader, 0.3, **options)


def score(model, given=None, **options):
    return singe.score(model, batch() if given is None else given, "layers.0", **options)


def fold(model, given=None, **options):
    return singe.fold_batchnorm(model, batch()[0] if given is None else given, **options)


FUNCTIONS = pytest.mark.parametrize("function", [prune, score, fold])


# -- what is the caller's ----------------------------------------------------------------------------------------


@contextmanager
def unusual_settings():
    """Every global setting of torch's away from its default."""
    kept = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    with ExitStack() as stack:
        torch.set_num_threads(1)
        stack.callback(torch.set_num_threads, kept[0])
        torch.set_float32_matmul_precision("medium")
        stack.callback(torch.set_float32_matmul_precision, kept[1])
        torch.backends.cudnn.benchmark = not kept[2]
        stack.callback(setattr, torch.backends.cudnn, "benchmark", kept[2])
        torch.use_deterministic_algorithms(True, warn_only=True)
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, torch.float32)
        for mode in (torch.autograd.set_detect_anomaly(True), torch.autocast("cpu", cache_enabled=False)):
            stack.enter_context(mode)
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(warnings.catch_warnings())
        yield


@contextmanager
def as_before(model, *generators):
    """Fails if the model, a random generator or a global setting is another at the end."""
    before = snapshot(model), random_states(*generators), global_settings(), list(warnings.filters)
    yield
    assert same(snapshot(model), before[0])
    assert same(random_states(*generators), before[1])
    assert global_settings() == before[2]
    assert warnings.filters == before[3]


def in_use(kind=NormMLP):
    """A network in the middle of a training, as users have them."""
    model = mlp(kind)
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    model.train()
    model.layers[1].eval()
    model.layers[0].bias.requires_grad_(False)
    return model


def alike(result, expected):
    """Whether two results are the same but for rounding."""
    if isinstance(result, torch.Tensor):
        return result.dtype == expected.dtype and torch.allclose(result, expected, rtol=1e-4)
    a, b = result.model.state_dict(), expected.model.state_dict()
    one_plan = isinstance(result, singe.Folding) or result.plan == expected.plan
    return one_plan and a.keys() == b.keys() and all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-6) for k in a)


def arguments_of(function):
    """A batch as a function takes it, made outside of whatever holds when it is called."""
    x, y = batch()
    return {prune: [(x, y)], score: (x, y), fold: x}[function]


@FUNCTIONS
@pytest.mark.parametrize("gradients", [torch.inference_mode, torch.no_grad], ids=["inference mode", "no_grad"])
def test_the_callers_settings_stay_and_change_nothing(function, gradients):
    model, given = in_use(), arguments_of(function)
    expected = function(model, given)
    with unusual_settings(), gradients(), as_before(model):
        result = function(model, given)
    assert alike(result, expected)


@pytest.mark.parametrize("target", ["params", "macs", "latency"])
def test_whatever_is_counted_the_network_stays(target, measured):
    class Counting(NormMLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = in_use(Counting)
    with as_before(model):
        prune(model, target=target, criterion="magnitude")
        singe.forecast(model, [batch()], 0.3, target=target, criterion="magnitude", images=16, progress=False)
    assert model.calls == 1  # the user's own


@FUNCTIONS
def test_the_callers_default_device_stays_and_changes_nothing(function):
    model, given = in_use(), arguments_of(function)
    expected = function(model, given)
    with torch.device("meta"), as_before(model):  # stands for a GPU
        assert torch.empty(0).device.type == "meta"
        result = function(model, given)
    assert alike(result, expected)


@FUNCTIONS
def test_a_network_made_in_inference_mode_is_as_good_as_any(function):
    with torch.inference_mode():
        made = mlp()
    assert made.layers[0].weight.is_inference()
    assert alike(function(made), function(mlp()))


@pytest.mark.parametrize("criterion", ["magnitude", "reconstruction"])
def test_so_it_is_where_layers_are_refitted(criterion):
    with torch.inference_mode():
        made = mlp()
    options = {"criterion": criterion, "compensate": "least_squares", "compensation_images": 16}
    assert alike(prune(made, **options), prune(mlp(), **options))


class Stop(Exception):
    """What no code of the package expects."""


class Breaking:
    """A shuffling loader that draws from every generator and fails at a later batch."""

    def __init__(self, after):
        self.generator, self._left = torch.Generator().manual_seed(5), itertools.count(after, -1)
        self._loader = DataLoader(TensorDataset(*batch(24)), batch_size=8, shuffle=True, generator=self.generator)

    def __iter__(self):
        for x, y in self._loader:
            if next(self._left) <= 0:
                raise Stop("disk")
            yield x + torch.rand(()) + np.random.rand() + random.random(), y


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_all_is_as_before_when_the_loader_fails_in_the_middle(after):
    model, loader = in_use(), Breaking(after)
    with unusual_settings(), as_before(model, loader.generator), pytest.raises(Stop, match="disk"):
        prune(model, loader, finetune=FineTune(steps=4, when="layer"))


def failing(after):
    """A loss that fails at a later call, and how often it was called."""
    calls = []

    def loss(outputs, batch):
        calls.append(torch.rand(()))
        if len(calls) > after:
            raise Stop("loss")
        return F.cross_entropy(outputs, batch[1])

    return loss, calls


@pytest.mark.parametrize(("function", "after"), [(prune, 0), (prune, 12), (prune, 30), (score, 0), (score, 5)])
def test_all_is_as_before_when_the_loss_fails_in_the_middle(function, after):
    model, (loss, calls) = in_use(), failing(after)
    with unusual_settings(), as_before(model), pytest.raises(Stop, match="loss"):
        function(model, loss=loss)
    assert len(calls) == after + 1


@pytest.mark.parametrize("function", [prune, fold])
@pytest.mark.parametrize("after", [1, 3])
def test_all_is_as_before_when_the_network_fails_in_the_middle(function, after):
    calls = itertools.count()

    def forward(model, given):
        if next(calls) >= after:
            torch.rand(3)
            raise Stop("forward")
        return model(given[0] if isinstance(given, tuple) else given)

    model = in_use()
    with unusual_settings(), as_before(model), pytest.raises((Stop, ValueError), match="forward"):
        function(model, forward=forward)


# -- networks that cannot be exported ----------------------------------------------------------------------------


class Branching(MLP):
    def forward(self, x):
        if x.sum() > 0:  # depends on the data
            return self.layers(x)
        return -self.layers(x)


class Item(MLP):
    def forward(self, x):
        largest = x.abs().max().item()
        return self.layers(x / largest) if largest > 1 else self.layers(x)


class Count(MLP):
    def forward(self, x):
        y = self.layers(x)
        return y + torch.zeros(int(y.argmax().item()) + 1).sum()


LINES = {Branching: "if x.sum() > 0:", Item: "if largest > 1", Count: "int(y.argmax().item())"}


@pytest.mark.parametrize(("function", "kind"), [(prune, Branching), (prune, Item), (score, Item), (score, Count),
                                                (fold, Branching), (fold, Count)])  # fmt: skip
def test_the_line_that_cannot_be_exported_is_named_and_nothing_is_printed(function, kind, capfd, caplog, monkeypatch):
    source, first = inspect.getsourcelines(kind)
    monkeypatch.setattr(logging.getLogger("torch"), "handlers", [caplog.handler])  # else they print past capfd
    at = next(i for i, line in enumerate(source) if LINES[kind] in line)
    with pytest.raises(ValueError, match=r"torch\.export can trace") as caught:
        function(mlp(kind))
    message = str(caught.value)
    assert f"exporting {kind.__name__} on inputs of shape (16, 10)" in message
    assert f"at {__file__}:{first + at} ({source[at].split('#')[0].strip()}" in message
    assert re.search(r"data-dependent|Could not", message) and "\n" not in message
    assert capfd.readouterr() == ("", "")
    assert not [r for r in caplog.records if r.name.startswith("torch") and r.levelno >= logging.WARNING]


# -- layouts -----------------------------------------------------------------------------------------------------


def watch(model):
    return singe.GradualPruner(model, batch()[0], every=1, per_round=1, until=1)


def look(model):
    return singe.inspect(model, batch()[0])


def prune_weights(model):
    return singe.prune(model, [batch()], 0.3, structured=False, images=16, finetune=None, progress=False)


@pytest.mark.parametrize("function", [prune, prune_weights, score, fold, look, watch])
def test_a_buffer_that_is_not_strided_is_refused_before_work(function):
    model = mlp()
    model.register_buffer("adjacency", torch.eye(10).to_sparse())
    with pytest.raises(ValueError, match=r"expected strided tensors, got adjacency of layout torch\.sparse_coo"):
        function(model)


# -- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("criterion", ["magnitude", "integrated_gradient"])
def test_half_precision_prunes_on_the_cpu(dtype, criterion):
    x, y = images(8)
    x = x.to(dtype)
    model = randomised(PlainNet()).to(dtype)
    options = {"criterion": criterion, "finetune": FineTune(steps=2, when="layer"), "images": 8, "recalibrate_bn": 8}
    result = singe.prune(model, [(x, y)], 0.3, progress=False, **options)
    assert result.params_removed == pytest.approx(0.3, abs=0.02)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model(x).isfinite().all()


@FUNCTIONS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32], ids=str)
def test_weights_that_are_no_real_numbers_of_two_bytes_or_more_are_refused(function, dtype):
    model = mlp()
    model.layers[0].weight = nn.Parameter(model.layers[0].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"float64, float32, float16 or bfloat16, got .* of {dtype}"):
        function(model)


@FUNCTIONS
def test_a_device_that_does_not_compute_in_half_precision_is_named_with_its_own_words(function, monkeypatch):
    conv2d = F.conv2d

    def picky(x, *arguments, **options):
        if x.dtype is torch.float16:
            raise RuntimeError("\"slow_conv2d_cpu\" not implemented for 'Half'")
        return conv2d(x, *arguments, **options)

    monkeypatch.setattr(F, "conv2d", picky)
    with pytest.raises(ValueError, match=r"a dtype that cpu computes in, got torch\.float16: \"slow_conv2d_cpu\""):
        function(mlp().half())
    function(mlp())
