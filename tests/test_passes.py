import logging
import weakref

import pytest
import torch
from networks import DenseNet, DigitNet, ExciteNet, MobileNet, PlainNet, images, randomised
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import singe
from singe.engine import Engine
from singe.graph.analysis import find_groups
from singe.graph.suffix import cut
from singe.graph.trace import trace
from singe.surgery import mask
from singe.task import Task

FEW = singe.GaussLegendre(2)
CRITERIA = [
    singe.IntegratedGradient(quadrature=FEW),
    singe.IntegratedGradient(p=1, quadrature=FEW, path="layer"),
    singe.LossChange(),
]


class LiveBytes(TorchDispatchMode):
    """How many bytes the results of all operators hold at a time, and the most they held."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size


def setting(model, batch, group):
    graph = trace(model, batch[0])
    return model, graph, next(g for g in find_groups(graph) if g.name == group), batch


class Wide(nn.Module):
    """Most of its memory goes into values, not weights."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("memory", [1 << 18, 1 << 20, 1 << 22, 1 << 24])
@pytest.mark.parametrize("layer", ["features.0", "features.6"])
def test_no_more_bytes_are_held_than_memory_says(layer, memory):
    """One image takes 50 kB a pass, all 32 take 1.6 MB, and 24 jobs on them 40 MB."""
    model, graph, group, batch = setting(randomised(Wide()), images(32, 16), layer)
    with LiveBytes() as held:
        engine = Engine(model, graph, group, batch, memory=memory)
        for criterion in CRITERIA:
            engine.scores(criterion)
    assert (engine.parts > 1) is (memory < 1 << 22)
    assert held.most <= memory + (96 << 10)  # weights in another memory format, scores, gradients of weights
    assert held.most >= memory / 8 or memory == 1 << 24  # and it makes use of it


@pytest.mark.parametrize(
    ("make", "layer"), [(PlainNet, "features.4"), (MobileNet, None), (DenseNet, None), (ExciteNet, None)]
)
@pytest.mark.parametrize("memory", [1, 1 << 14])
def test_images_in_parts_score_as_together(make, layer, memory):
    model, (x, y) = randomised(make()).double(), images(7)
    graph = trace(model, x.double())
    for group in [g for g in find_groups(graph) if not g.frozen and layer in (None, g.name)][:2]:
        whole = Engine(model, graph, group, (x.double(), y))
        parts = Engine(model, graph, group, (x.double(), y), memory=memory)
        assert whole.parts == 1 < parts.parts <= 7
        for criterion in CRITERIA:
            torch.testing.assert_close(parts.scores(criterion), whole.scores(criterion), rtol=1e-9, atol=1e-13)
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        mask(model, group.slices, torch.tensor([1]))
        for engine in (whole, parts):
            engine.forget(1)
        for criterion in CRITERIA:
            torch.testing.assert_close(parts.scores(criterion), whole.scores(criterion), rtol=1e-9, atol=1e-13)
        model.load_state_dict(kept)


class Seeing(Wide):
    """Every sample sees the batch's mean."""

    def forward(self, x):
        features = self.features(x).mean((2, 3))
        return self.head(features - features.mean(0))


def test_samples_that_see_each_other_are_not_passed_in_parts_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING, "singe"):
        engine = Engine(*setting(randomised(Seeing()), images(6), "features.0"), memory=1)
    assert (engine.parts, engine.chunk) == (1, 1)
    assert "features.0: samples cannot be passed in parts" in caplog.text


def test_a_loss_of_the_whole_batch_sees_the_whole_batch_in_parts_too():
    def contrast(outputs, batch):
        assert len(outputs) == len(batch[1])
        return (F.normalize(outputs, dim=1) @ F.normalize(outputs, dim=1).T).square().mean()

    where = setting(randomised(Wide()).double(), (images(6)[0].double(), images(6)[1]), "features.3")
    whole, parts = (Engine(*where, task=Task(loss=contrast), memory=m) for m in (1 << 30, 1))
    assert parts.parts == 6
    torch.testing.assert_close(parts.scores(CRITERIA[0]), whole.scores(CRITERIA[0]), rtol=1e-9, atol=1e-13)


def test_outputs_reach_the_loss_as_the_model_gives_them():
    """Convolutions run with channels last; a loss that views its input must not notice."""
    seen = []

    def loss(outputs, batch):
        seen.append(outputs.is_contiguous())
        return outputs.view(len(outputs), -1).square().mean()

    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    scores = Engine(*setting(model, images(), "0"), task=Task(loss=loss)).scores(CRITERIA[0])
    assert scores.min() > 0 and seen and all(seen)


def test_shortcuts_are_broadcast_and_dead_operands_overwritten():
    model, graph, group, batch = setting(randomised(DigitNet(3)), images(channels=1), "blocks.1.conv1")
    engine = Engine(model, graph, group, batch)
    whole = engine._passes._down.whole
    (shortcut,) = whole.constants
    assert shortcut in cut(graph, engine._passes._down.by_output).boundary
    assert not whole.stacked
    names = {str(n.target) for n in whole.overwritten}
    assert names == {"aten.relu.default", "aten.add.Tensor"}
    for node, index in whole.overwritten.items():
        assert len(node.args[index].users) == 1
        assert node.args[index] not in {*whole.sources, *graph.outputs, *engine._passes._down.by_output}
