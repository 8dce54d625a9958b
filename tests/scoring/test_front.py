import copy
import functools

import pytest
import torch
from networks import DigitNet, MobileNet, PlainNet, images, randomised
from torch import nn

import singe
from singe.graph import batchnorm
from singe.graph.analysis import find_groups
from singe.graph.layer import find_layers, is_affine
from singe.graph.suffix import cut
from singe.graph.trace import trace
from singe.removal.surgery import mask
from singe.scoring import stretch
from singe.scoring.engine import Engine
from singe.scoring.front import find_front


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Shortcut(nn.Module):
    """relu(x + conv2(relu(conv1(x)))), with conv2's batch norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2, self.bn2 = conv(3, 6), conv(6, 5), conv(5, 6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.bn2(self.conv2(self.conv1(x).relu()))).relu().mean((2, 3)))


class Twice(nn.Module):
    """conv1's channels reach two layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.left, self.right, self.head = conv(3, 6), conv(6, 5), conv(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.conv1(x).relu()
        return self.head((self.left(x) * self.right(x)).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over [batch, positions, channels]."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down, self.head = (nn.Linear(*s) for s in ((8, 6), (6, 9), (9, 6), (6, 4)))

    def forward(self, x):
        x = self.embed(x.flatten(1, 2))
        return self.head((x + self.down(self.up(x).relu())).mean(1))


def seq(*modules):
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


NETWORKS = {
    # network, its layer, operators of the chain, of the tail, whether a relu ends it
    "relu": (lambda: seq(conv(3, 6), nn.ReLU(), conv(6, 4), nn.ReLU()), "0", ["relu"], [], True),
    "no activation": (lambda: seq(conv(3, 6), conv(6, 4, stride=2, dilation=2)), "0", [], [], False),
    "pools": (
        lambda: seq(conv(3, 6), nn.LeakyReLU(0.1), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Conv2d(6, 4, 2)),
        "0", ["leaky_relu", "max_pool2d", "avg_pool2d"], [], False,
    ),
    "shortcut": (Shortcut, "conv1", ["relu"], ["batch_norm", "add"], True),
    "mean and head": (lambda: DigitNet(3), "blocks.2.conv2", None, None, None),
    "shortcut and head": (Shortcut, "stem", None, None, None),
    "positions": (Tokens, "up", ["relu"], ["add"], False),
    "linear": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)), "1", ["relu"], [], False,
    ),
    "not homogeneous": (lambda: seq(conv(3, 6), nn.SiLU(), conv(6, 4)), "0", None, None, None),
    "relu6": (lambda: seq(conv(3, 6), nn.ReLU6(), conv(6, 4)), "0", None, None, None),
    "two readers": (Twice, "conv1", None, None, None),
    "depthwise reader": (lambda: seq(conv(3, 6), nn.ReLU(), conv(6, 6, groups=6), conv(6, 4)), "0", None, None, None),
    "grouped reader": (lambda: seq(conv(3, 6), nn.ReLU(), conv(6, 4, groups=2)), "0", None, None, None),
    "norm behind an activation": (
        lambda: seq(conv(3, 6), nn.ReLU(), nn.BatchNorm2d(6), conv(6, 4)), "0", None, None, None,
    ),
    "flattened": (lambda: nn.Sequential(conv(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)), "0", None, None, None),
    "reader with padding='same'": (
        lambda: seq(conv(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 2, padding="same")), "0", None, None, None,
    ),
}  # fmt: skip


@functools.cache
def analysed(name):
    """A network, which stays as it is, a batch, the graph, and the group of its layer."""
    make, layer, *_ = NETWORKS[name]
    channels = 1 if isinstance(model := make(), DigitNet) else 3
    model, (x, y) = randomised(model).double(), images(channels=channels)
    graph = trace(model, x.double())
    return model, (x.double(), y), graph, next(g for g in find_groups(graph) if g.name == layer)


class Setting:
    def __init__(self, name):
        model, self.batch, self.graph, self.group = analysed(name)
        self.model, self.expected = copy.deepcopy(model), NETWORKS[name][2:]

    def engine(self, **options):
        return Engine(self.model, self.graph, self.group, self.batch, **options)


@pytest.fixture(params=NETWORKS)
def setting(request):
    return Setting(request.param)


def name(node):
    return str(node.target).split(".")[1]


def test_the_front_is_what_moves_along_one_direction(setting):
    chain, tail, relu = setting.expected
    layers = find_layers(setting.graph, setting.group)
    suffix = cut(setting.graph, [layer.output for layer in layers])
    live = setting.graph.live(setting.model)
    folded = {batchnorm.following(n) for n in suffix.nodes if is_affine(n) and batchnorm.folds(n, live)}
    front = find_front(setting.graph, suffix, layers[0], folded) if len(layers) == 1 else None
    if chain is None:
        assert front is None
    else:
        assert [name(n) for n in front.chain] == chain
        assert [name(n) for n in front.tail] == tail
        assert (front.relu is not None) is relu
        assert set(front.nodes) <= set(suffix.nodes)
        assert front.output in (front.end, front.relu)


CRITERIA = [
    singe.IntegratedGradient(quadrature=singe.GaussLegendre(3)),
    singe.SummedGradient(p=1, quadrature=singe.Geometric(0.5)),
    singe.LossChange(),
]


@pytest.mark.parametrize("memory", [1 << 20, 1 << 30], ids=["contributions per chunk", "contributions kept"])
def test_through_the_front_scores_are_those_of_running_the_next_layer(setting, monkeypatch, memory):
    engine = setting.engine(memory=memory)
    with monkeypatch.context() as without:
        without.setattr("singe.scoring.downstream.find_front", lambda *_: None)
        plain = setting.engine()
        assert plain.loss > 0  # which makes its passes
    has_front = engine._passes._all.front is not None
    assert has_front is (setting.expected[0] is not None) and plain._passes._all.front is None
    if has_front and memory == 1 << 20:
        engine._passes._all.front._keeps = False
    removals = [2, 0]
    for removed in range(len(removals) + 1):
        for criterion in CRITERIA:
            actual, expected = engine.scores(criterion), plain.scores(criterion)
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
        assert engine.loss == pytest.approx(plain.loss, rel=1e-12)
        if removed < len(removals):
            mask(setting.model, setting.group.slices, torch.tensor([removals[removed]]))
            for each in (engine, plain):
                each.forget(removals[removed])


@pytest.mark.parametrize("t", [[1.0, 0.5, 0.0], [1.5, 0.5, -0.5]])
def test_a_path_of_the_users_own_is_followed_wherever_it_goes(t):
    """Behind t = 0 the activations in between are no longer homogeneous."""

    class Own:
        def dt(self):
            return torch.tensor(t).double(), torch.tensor([0.3, 0.4, 0.3]).double()

        log_dt = dt

    setting = Setting("relu")
    criterion = singe.IntegratedGradient(quadrature=Own())
    actual = setting.engine().scores(criterion)
    expected = singe.reference.score(setting.model, setting.batch, "0", criterion=criterion)
    torch.testing.assert_close(actual, expected)


def test_the_next_layer_does_not_run_per_job(monkeypatch):
    setting = Setting("relu")
    engine = setting.engine()
    engine.scores(CRITERIA[0])
    seen = []
    conv2d = torch.ops.aten.conv2d.default
    evaluate = stretch.evaluate
    monkeypatch.setattr(stretch, "evaluate", lambda node, *a: seen.append(node.target) or evaluate(node, *a))
    engine.scores(CRITERIA[0])
    assert seen and conv2d not in seen


@pytest.mark.parametrize("make", [PlainNet, MobileNet])
def test_masked_models_of_many_kinds_score_as_in_the_reference(make):
    model, (x, y) = randomised(make()).double(), images()
    batch = x.double(), y
    graph = trace(model, batch[0])
    group = next(g for g in find_groups(graph) if not g.frozen)
    mask(model, group.slices, torch.tensor([1]))
    expected = singe.reference.score(copy.deepcopy(model), batch, group.name)
    torch.testing.assert_close(Engine(model, graph, group, batch).scores(singe.IntegratedGradient()), expected)
