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
