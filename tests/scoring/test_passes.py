import logging
import weakref
from functools import cache
from itertools import pairwise

import pytest
import torch
from networks import DenseNet, DigitNet, ExciteNet, MobileNet, PlainNet, images, randomised
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import singe
from singe.graph.analysis import find_groups
from singe.graph.suffix import cut
from singe.graph.trace import trace
from singe.removal.surgery import mask
from singe.scoring.engine import Engine
from singe.scoring.stretch import stretch
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


class Residual(nn.Module):
    """One stream that many layers write."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(4)
        )

    def forward(self, x):
        x = self.stem(x).relu()
        for inner in self.inner:
            x = (x + inner(x)).relu()
        return self.head(x.mean((2, 3)))


def pooled():
    layers, inputs = [], 3
    for _ in range(3):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)]
        inputs = 16
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def thin():
    """The next layer puts out much less than the one that fades."""
    widths = (3, 32, 2, 4)
    layers = [m for i, o in pairwise(widths) for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


@cache
def graph_of(make):
    """Run with the live parameters of any copy."""
    return trace(randomised(make()), images(2, 16)[0])


@pytest.mark.parametrize("memory", [1 << 19, 1 << 22])
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (Wide, "features.0"),
        (Wide, "features.6"),
        (Residual, "stem"),
        (Residual, "inner.3.0"),
        (pooled, "0"),
        (thin, "0"),
        (Wide, "features.12"),
    ],
)
def test_no_more_bytes_are_held_than_memory_says(make, layer, memory):
    model, graph, batch = randomised(make()), graph_of(make), images(32, 16)
    group, used = next(g for g in find_groups(graph) if g.name == layer), 0
    for criterion in CRITERIA:
        with LiveBytes() as held:
            engine = Engine(model, graph, group, batch, memory=memory)
            engine.scores(criterion, torch.arange(min(2 * engine.chunk, group.size)))
        assert held.most <= memory + (96 << 10)  # weights in another memory format, scores, gradients of weights
        used = max(used, held.most)
    assert engine.parts > 1 or memory > 1 << 19 or layer == "features.12"  # where only what lies before is large
    assert used >= memory / 8 or memory > 1 << 19  # and it makes use of it


@pytest.mark.parametrize(
    ("make", "layer", "memory"),
    [
        (PlainNet, "features.4", 1),
        (PlainNet, "features.4", 1 << 14),
        (MobileNet, None, 1),
        (DenseNet, None, 1 << 14),
        (ExciteNet, None, 1),
    ],
)
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


class Lambda(nn.Module):
    """Layers a, b, c ... and a function of the model and its input."""

    def __init__(self, function, *layers):
        super().__init__()
        for name, layer in zip("abcdef", layers, strict=False):
            setattr(self, name, layer)
        self._function = function

    def forward(self, x):
        return self._function(self, x)


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def strided(m, x):
    z = m.a(x)
    return m.b(z.as_strided((len(z), 5, 4, 4), (320, 64, 16, 2)).tanh().mean((2, 3)))


def as_complex(m, x):
    z = m.a(x).tanh().reshape(len(x), 5, 8, 4, 2)
    return m.b(torch.view_as_complex(z).abs().mean((2, 3)))


def complex_output(m, x):
    w = m.b(m.a(x).tanh().mean((2, 3)))
    return w, torch.complex(w, w.sin())


def with_auxiliary(m, x):
    aside = m.d(x).mean((2, 3))
    return m.b(m.a(x).relu()).mean((2, 3)) + aside, aside


def tokens(m, x):
    return m.b(m.a(x.flatten(1, 2)).tanh()).reshape(-1, 4)


def squeezed(m, x):
    return m.c(F.softmax(m.b(F.adaptive_avg_pool2d(m.a(x).tanh(), 1).squeeze()), 1))


def computed_bias(m, x):
    return F.linear(m.a(x).relu().mean((2, 3)), m.b.weight, m.b.bias * 2)


def normalised_in_place(outputs, batch):
    return F.cross_entropy(outputs.mul_(2), batch[1])


def writes_beside(outputs, batch):
    outputs[1].mul_(2)
    return F.cross_entropy(outputs[0], batch[1]) + outputs[1].square().mean()


def of_complex(outputs, batch):
    return F.cross_entropy(outputs[0], batch[1]) + outputs[1].imag.square().sum()


def of_tokens(outputs, batch):
    return F.cross_entropy(outputs.view(len(batch[1]), -1, 4).mean(1), batch[1])


ODD = {
    "reads strides": (Lambda(strided, conv(3, 5), nn.Linear(5, 4)), None),
    "pairs as complex numbers": (Lambda(as_complex, conv(3, 5), nn.Linear(5, 4)), None),
    "complex output": (Lambda(complex_output, conv(3, 5), nn.Linear(5, 4)), of_complex),
    "loss writes into what does not depend on the layer": (
        Lambda(with_auxiliary, conv(3, 5), conv(5, 4), conv(3, 4), conv(3, 4)), writes_beside,
    ),
    "loss writes into its input": (
        Lambda(lambda m, x: m.b(m.a(x).relu()).mean((2, 3)), conv(3, 5), conv(5, 4)), normalised_in_place,
    ),
    "loss writes into the front's output": (
        Lambda(lambda m, x: m.b(m.a(x.mean((2, 3))).relu()), nn.Linear(3, 5), nn.Linear(5, 4)), normalised_in_place,
    ),
    "several entries a sample": (Lambda(tokens, nn.Linear(8, 6), nn.Linear(6, 4)), of_tokens),
    "knows no single image": (Lambda(squeezed, conv(3, 5), nn.Linear(5, 5), nn.Linear(5, 4)), None),
    "computed bias": (Lambda(computed_bias, conv(3, 5), nn.Linear(5, 4)), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_models_and_losses_score_as_in_the_reference(name, one_export):
    (model, loss), (x, y) = ODD[name], images()
    model, graph, group, batch = setting(randomised(model).double(), (x.double(), y), "a")
    task = Task() if loss is None else Task(None, loss)
    for criterion in CRITERIA:
        expected = singe.reference.score(model, batch, "a", criterion=criterion, loss=loss)
        for memory in (1, 1 << 30):
            actual = Engine(model, graph, group, batch, task, memory).scores(criterion)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_only_operators_on_two_values_share_a_constant():
    model = Lambda(lambda m, x: m.b(torch.addcmul(x, z := m.a(x), z).mean((2, 3))), conv(3, 3), nn.Linear(3, 4)).eval()
    graph = trace(model, images()[0])
    suffix = cut(graph, graph.calls("a.weight"))
    on = stretch(graph, suffix, suffix.nodes, suffix.roots, (), ())
    assert not on.shared
    assert list(on.stacked) == graph.inputs


def test_views_are_not_written_into():
    """Autograd pays for that with copies: a linear layer over positions puts out a view, a broadcast sum is one."""
    model = Lambda(
        lambda m, x: m.c((m.b((z := m.a(x.flatten(1, 2))).relu()) + z).mean(1)),
        nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4),
    )  # fmt: skip
    engine = Engine(*setting(randomised(model), images(), "a"))
    down = engine._passes._down
    assert not down.whole.overwritten and not down.behind.overwritten


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
