import pytest
import torch
from beside import Beside, inside_all
from networks import DenseNet, ExciteNet, MobileNet, images, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

from singe.graph.analysis import find_groups
from singe.graph.fading import ends_elsewhere
from singe.graph.trace import trace


def culprits(model, x):
    """{group: the operator by which its fading does not end at nothing, or None} of the groups that are not frozen."""
    graph = trace(model, x)
    found = {g.name: ends_elsewhere(graph, g) for g in find_groups(graph) if g.frozen is None}
    return {name: node and node.target.overloadpacket.__name__ for name, node in found.items()}


ENDS = {
    "relu": (F.relu, None),
    "sigmoid": (torch.sigmoid, "sigmoid"),
    "softplus": (F.softplus, "softplus"),
    "exp": (torch.exp, "exp"),
    "cos": (torch.cos, "cos"),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid"),
    "hardswish": (F.hardswish, None),
    "clamped from below": (lambda y: y.clamp(0.1), "clamp"),
    "clamped around zero": (lambda y: y.clamp(-1, 1), None),
    "threshold": (lambda y: F.threshold(y, 0.5, 2.0), "threshold"),
    "sum with a number": (lambda y: y + 1, "add"),
    "sum with itself": (lambda y: y + y.relu(), None),
    "product with a number": (lambda y: 3 * y, None),
    "swish by hand": (lambda y: y * y.sigmoid(), None),
    "first sigmoid, then relu": (lambda y: y.sigmoid().relu(), "sigmoid"),
    "shifted back": (lambda y: y.sigmoid() - 0.5, None),
    "scaled, then exp": (lambda y: (2 * y).exp(), "exp"),
    "power": (lambda y: y**2, None),
    "zeroth power": (lambda y: y**0, "pow"),
    "less than": (lambda y: (y < 1).to(y.dtype), "lt"),
    "condition on itself": (lambda y: torch.where(y > 0, y, 0.1 * y), None),
    "other branch": (lambda y: torch.where(y > 0, y, torch.ones_like(y)), "ones_like"),
    "largest of two": (lambda y: torch.maximum(y, -y), None),
    "moved about": (lambda y: torch.cat([y, y.flip(0)], 1)[:, :6].unsqueeze(2).expand(-1, -1, 2).mean(2), None),
    "padded positions": (lambda y: F.pad(y.unsqueeze(2), (1, 1), value=1.0).mean(2), "pad"),
}  # fmt: skip


def between(function):
    """A function between two linear layers."""
    return Wired(lambda self, x: self.b(function(self.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))


def test_the_first_operator_that_makes_something_of_zero_is_found():
    model = Beside({case: between(function) for case, (function, _) in ENDS.items()})
    assert culprits(model, normal(3, 4)) == inside_all({case: {"a": end} for case, (_, end) in ENDS.items()})


def test_what_another_value_adds_is_seen_and_what_it_multiplies_is_not():
    def wiring(self, x):
        y = self.a(x)
        return self.c(y + x.mean(1, keepdim=True)) + self.d(self.b(x) * x.sum(1, keepdim=True))

    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 5), "c": nn.Linear(6, 3), "d": nn.Linear(5, 3)}
    assert culprits(Wired(wiring, **layers), normal(3, 4)) == {"a": "add", "b": None}


def test_the_same_number_at_every_neuron_shows_whatever_else_is_concatenated():
    def wiring(self, x):
        return self.head(torch.cat([self.a(x).relu(), self.b(x).sigmoid()], 1))

    model = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 5), head=nn.Linear(11, 3))
    assert culprits(model, normal(3, 4)) == {"a": None, "b": "sigmoid"}


def test_a_gate_that_fades_with_what_it_gates_is_no_end():
    def gate(join):
        def wiring(self, x):
            y = self.a(x)
            return self.b(join(y, self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]).relu()).mean((2, 3))

        return Wired(wiring, a=nn.Conv2d(3, 6, 1), gate=nn.Linear(6, 6), b=nn.Conv2d(6, 4, 1))

    found = culprits(Beside({"gated": gate(torch.mul), "added": gate(torch.add)}), images()[0])
    assert (found["networks.gated.a"], found["networks.added.a"]) == (None, "sigmoid")


def test_every_reader_counts_also_one_that_writes_the_group_itself():
    def inner(self, x):
        y = self.a(x)
        return self.head(self.norm(self.again(y.exp())) + y.relu().log1p())

    def outer(self, x):
        y = self.a(x)
        self.norm(self.again(y.relu()))
        return self.head(y.exp())

    def layers():
        return {"a": nn.Linear(4, 6), "again": nn.Linear(6, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 3)}

    found = culprits(Beside({"inner": Wired(inner, **layers()), "outer": Wired(outer, **layers())}), normal(3, 4))
    assert (found["networks.inner.a"], found["networks.outer.a"]) == ("exp", "exp")


def test_a_depthwise_convolution_fades_whatever_it_reads_and_a_batch_norm_that_rides_along_too():
    def wiring(self, x):
        y = self.depthwise(self.a(x).sigmoid()).relu()
        return self.b(self.norm(y)).mean((2, 3))

    layers = {"a": nn.Conv2d(3, 6, 1), "depthwise": nn.Conv2d(6, 6, 3, groups=6), "norm": nn.BatchNorm2d(6)}
    assert culprits(Wired(wiring, **layers, b=nn.Conv2d(6, 4, 1)), images()[0]) == {"a": None}


@pytest.mark.parametrize("make", [MobileNet, ExciteNet, DenseNet], ids=lambda make: make.__name__)
def test_usual_networks_fade_to_nothing(make):
    assert set(culprits(randomised(make()), images()[0]).values()) == {None}
