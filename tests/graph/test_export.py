import contextlib
import gc
import linecache
import logging
import os

import pytest
import torch
from networks import MLP, DigitNet, images, randomised
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention.flex_attention import flex_attention
from wiring import normal

import singe
from singe.graph.trace import trace


class Stubborn(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_model_that_cannot_be_exported_is_named():
    with pytest.raises(ValueError, match="Stubborn"):
        trace(Stubborn(), normal(4, 3))


def test_objects_that_are_no_tensors_are_named():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, x):
            return x + torch.randn(3, generator=self.generator)

    with pytest.raises(ValueError, match=r"Noisy .*Generator"):
        trace(Noisy(), normal(4, 3))


BRANCH = "def forward(self, x):\n    return x if x.sum() > 0 else -x\n"


@pytest.mark.parametrize(
    "path",
    ["/home/me/net.py", f"{os.path.dirname(torch.__file__)}vision/net.py", f"{os.path.dirname(singe.__file__)}_net.py"],
    ids=["elsewhere", "torchvision", "beside this package"],
)
def test_the_line_that_cannot_be_exported_is_named_wherever_it_stands(path, monkeypatch):
    monkeypatch.setitem(linecache.cache, path, (len(BRANCH), None, BRANCH.splitlines(True), path))
    namespace = {}
    exec(compile(BRANCH, path, "exec"), namespace)
    model = type("Branch", (nn.Module,), namespace)()
    with pytest.raises(ValueError, match="Branch") as caught:
        trace(model, normal(4, 3))
    assert f"at {path}:2 (return x if x.sum() > 0 else -x)" in str(caught.value)


@pytest.mark.parametrize("make", [lambda: DigitNet(3), Stubborn], ids=["exported", "refused"])
def test_an_export_leaves_nothing_behind(make, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # whose records tests capture
    model, x = randomised(make()), images(channels=1)[0]
    with torch.no_grad():
        shapes, caches = [], []
    for _ in range(3):
        with contextlib.suppress(ValueError):
            trace(model, x)
        gc.collect()
        shapes.append(sum(type(o) is ShapeEnv for o in gc.get_objects()))
        caches.append([set(c) for c in (FakeTensorMode.cache, graph_module._loader.eval_cache, linecache.cache)])
    assert shapes[1] == shapes[-1], "what the last export was of may stay until the next"
    assert caches[0] == caches[-1]


def test_caches_of_others_stay(monkeypatch):
    entry = object()
    monkeypatch.setitem(FakeTensorMode.cache, "theirs", entry)
    trace(randomised(MLP()), normal(4, 10))
    assert FakeTensorMode.cache["theirs"] is entry


class OwnGradients(nn.Module):
    """Switches gradients on for a part of itself, and stops them elsewhere."""

    def __init__(self, switched):
        super().__init__()
        self.a, self.b, self.c, self.switched = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(12, 4), switched

    def forward(self, x):
        with torch.enable_grad() if self.switched else contextlib.nullcontext():
            y = self.b(self.a(x).relu())
        return self.c(torch.cat([y.relu(), y.detach()], 1))


def test_a_part_with_gradients_switched_on_scores_as_without_the_switch():
    batch = normal(12, 5).double(), torch.arange(12) % 4
    model = randomised(OwnGradients(True)).double()
    found = singe.score(model, batch, "a")
    assert torch.equal(found, singe.score(randomised(OwnGradients(False)).double(), batch, "a"))
    assert torch.allclose(found, singe.reference.score(model, batch, "a"), rtol=1e-9)


class Flexible(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.head = nn.Linear(16, 48), nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.q(x).unsqueeze(1).chunk(3, -1)
        return self.head(flex_attention(q, k, v).squeeze(1).mean(1))


def test_an_operator_that_takes_a_graph_is_named():
    with pytest.raises(ValueError, match=r"Flexible .* it uses flex_attention, which takes a graph of its own"):
        trace(Flexible(), normal(2, 6, 16))
