import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import ExciteNet, PlainNet, ResNeXt, images, randomised
from torch import nn
from torch.nn import functional as F

import singe
from singe.allocation.sensitivity import LEFT, Sensitivity, marginal
from singe.criteria import Magnitude, Reconstruction
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.refit.compensation import Compensator
from singe.refit.equations import Wanted
from singe.removal.surgery import mask
from singe.scoring.engine import Engine
from singe.scoring.reconstruction import Reconstructor
from singe.scoring.selection import order
from singe.task import Task

curves = st.dictionaries(st.integers(1, 30), st.floats(-1, 10), min_size=1).map(lambda c: {0: 0.0, **c})


def interpolated(rises, count):
    """The lowest straight line between two measured points at a number of neurons."""
    points = [(k, max(0.0, r)) for k, r in rises.items()]
    ends = [(a, b) for a in points for b in points if a[0] <= count <= b[0]]
    return min(
        a[1] if a[0] == b[0] else a[1] + (b[1] - a[1]) * (count - a[0]) / (b[0] - a[0])
        for a, b in ends
        if a[0] < b[0] or a[0] == count
    )


@given(curves)
def test_marginal_rises_are_the_slopes_of_the_lower_convex_hull(rises):
    size = max(rises) + 2
    slopes = marginal(rises, size)
    assert slopes.shape == (size,) and slopes.dtype == torch.float64
    assert (slopes.diff() >= -1e-9).all() and (slopes >= 0).all()
    sums = torch.cat([torch.zeros(1), slopes.cumsum(0)]).tolist()
    lowest = [interpolated(rises, k) for k in range(max(rises) + 1)]
    # a curve that falls is taken to be flat up to its lowest point
    assert sums[: max(rises) + 1] == pytest.approx([min(lowest[k:]) for k in range(len(lowest))], abs=1e-6)


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_neurons_whose_removal_leaves_no_finite_loss_go_last(lost):
    assert marginal({0: 0.0, 2: 0.5, 4: lost, 6: lost}, 7).tolist() == [0.25] * 2 + [math.inf] * 5
    assert marginal({0: 0.0, 3: lost}, 4).tolist() == [math.inf] * 4


def flattened():
    """Each channel is four columns of a linear layer."""
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


class Decoder(nn.Module):
    """A transposed layer in groups, and one that is used at two sizes."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        y = self.up(self.down(x).relu()).relu()
        return self.head(y).relu().mean((2, 3)) + self.head(F.avg_pool2d(y, 2)).mean((2, 3))


def prepared(make, how="none", memory=1 << 30):
    """A network, its graph and groups, two batches, and what measures its sensitivity."""
    torch.manual_seed(0)
    model = randomised(make()).double().eval()
    batches = [(x.double(), y) for x, y in (images(6, seed=i) for i in range(2))]
    graph, task = trace(model, batches[0][0]), Task()
    wanted = Wanted(model, graph, (images(20, seed=5)[0].double(), None), task, 1 << 30)
    compensator = None if how == "none" else Compensator(wanted, how)
    groups = [g for g in find_groups(graph) if g.frozen is None]
    return model, graph, groups, batches, compensator, Sensitivity(model, graph, batches, task, compensator, memory)


@pytest.mark.parametrize("memory", [1 << 30, 1], ids=["plenty", "scarce"])
@pytest.mark.parametrize("how", ["none", "mean", "least_squares"])
@pytest.mark.parametrize("make", [PlainNet, flattened, ResNeXt, ExciteNet, Decoder])
def test_prices_are_those_of_the_whole_network_masked_and_refitted(make, how, memory):
    model, graph, groups, batches, compensator, sensitivity = prepared(make, how, memory)

    def loss(network):
        with torch.no_grad():
            return sum(float(F.cross_entropy(network(x), y)) for x, y in batches) / 2

    for group in groups:
        gone = torch.arange(group.size).flip(0)
        rises = {0: 0.0}
        for left in {max(1, round(share * group.size)) for share in LEFT} - {group.size}:
            pruned = copy.deepcopy(model)
            mask(pruned, group.slices, gone[: group.size - left])
            if compensator is not None:
                compensator.refit(pruned, graph, group)
            rises[group.size - left] = loss(pruned) - loss(model)
        assert len(rises) > 1
        expected = marginal(rises, group.size)
        assert torch.allclose(sensitivity.prices(group, gone), expected, rtol=1e-6, atol=1e-9)


def test_measuring_leaves_the_network_as_it_was():
    model, _, groups, _, _, sensitivity = prepared(PlainNet, "least_squares")
    before = copy.deepcopy(model.state_dict())
    sensitivity.prices(groups[0], torch.arange(groups[0].size))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_order_of_removal_is_that_of_scores_or_of_elimination():
    model, graph, groups, batches, _, _ = prepared(PlainNet)
    engine = Engine(model, graph, groups[0], batches[0])
    assert torch.equal(order(engine, Magnitude()), engine.scores(Magnitude()).argsort(stable=True))
    wanted = Wanted(model, graph, batches[0], Task(), 1 << 30)
    scorer, again = (Reconstructor(model, graph, groups[0], wanted) for _ in range(2))
    eliminated = order(scorer, Reconstruction())
    assert sorted(eliminated.tolist()) == list(range(groups[0].size))
    left = list(range(groups[0].size))
    for neuron in eliminated.tolist():
        scores = again.scores(Reconstruction(), torch.tensor(left))
        assert neuron == left[int(scores.argmin())]
        again.forget(neuron)
        left.remove(neuron)


class Lopsided(nn.Module):
    """Of two hidden layers, the second has each of its neurons eight times."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            for p in self.second.parameters():
                p.copy_(p[:2].repeat(8, *[1] * (p.dim() - 1)))

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("criterion", ["reconstruction", "integrated_gradient"])
def test_what_the_network_can_do_without_goes_first(criterion):
    torch.manual_seed(1)
    model = Lopsided()
    x = torch.randn(64, 6)
    loader = [(x, 4 * model(x).softmax(1).detach()) for _ in range(3)]
    options = {"finetune": None, "compensate": "least_squares", "criterion": criterion, "progress": False}
    options |= {"loss": lambda outputs, batch: (4 * outputs.softmax(1) - batch[1]).square().sum(1).mean(), "images": 32}
    result = singe.prune(model, loader, 0.4, allocation="sensitivity", **options)
    even = singe.prune(model, loader, 0.4, allocation="uniform", **options)
    assert result.model.second.out_features < result.model.first.out_features
    assert result.params_removed == pytest.approx(0.4, abs=0.05)
    assert result.loss_after < even.loss_after
