import pytest
import torch
from networks import DigitNet, PlainNet, images, randomised
from torch import nn
from wiring import Wired, normal

from singe.graph.analysis import find_groups
from singe.graph.layer import find_layers
from singe.graph.suffix import cut
from singe.graph.trace import trace


@pytest.fixture(scope="module")
def residual():
    model = randomised(DigitNet(3))
    graph = trace(model, images(channels=1)[0])
    cuts = {g.name: [layer.output for layer in find_layers(graph, g)] for g in find_groups(graph)}
    return model, graph, cuts


def resumed(graph, model, suffix, x):
    """The output from the roots and the boundary alone."""
    env = graph.live(model) | graph.feed(x)
    graph.run(suffix.prefix, env, len(x), keep=[*suffix.roots, *suffix.boundary])
    held = {n: env[n] for n in (*suffix.roots, *suffix.boundary)}
    env = graph.live(model) | held
    graph.run(suffix.nodes, env, len(x), keep=graph.outputs)
    return env[graph.outputs[0]]


def test_prefix_then_suffix_is_the_network_for_every_group(residual):
    model, graph, cuts = residual
    x = images(3, channels=1)[0]
    assert len(cuts) == 7
    for at in cuts.values():
        torch.testing.assert_close(resumed(graph, model, cut(graph, at), x), model(x))


def test_every_operator_runs_on_the_side_it_belongs_to(residual):
    _, graph, cuts = residual
    for at in cuts.values():
        suffix = cut(graph, at)
        assert not set(suffix.prefix) & set(suffix.nodes)
        assert set(suffix.roots) <= set(suffix.prefix)
        behind = set(suffix.roots)
        for node in suffix.nodes:
            assert any(i in behind for i in node.all_input_nodes), "depends on a root"
            behind.add(node)
        assert not behind & set(suffix.boundary)
        assert graph.outputs[0] in behind


def test_the_roots_are_the_cuts_that_depend_on_no_other(residual):
    _, graph, cuts = residual
    first, second = cuts["stem"]
    suffix = cut(graph, [second, first])
    assert suffix.roots == (first,)
    assert second in suffix.nodes
    assert suffix.boundary == ()
    side_by_side = cut(graph, cuts["blocks.1.conv2"])
    assert set(side_by_side.roots) == set(cuts["blocks.1.conv2"])


def test_what_goes_around_the_cut_is_boundary(residual):
    model, graph, cuts = residual
    suffix = cut(graph, cuts["blocks.0.conv1"])
    (around,) = suffix.boundary
    x = images(3, channels=1)[0]
    env = graph.live(model) | graph.feed(x)
    graph.run(suffix.prefix, env, 3, keep=[around])
    torch.testing.assert_close(env[around], torch.relu(model.bn(model.stem(x))))


def test_a_cut_at_the_end_leaves_nothing_to_run():
    model, x = randomised(PlainNet()), images(3)[0]
    graph = trace(model, x)
    suffix = cut(graph, graph.outputs)
    assert suffix.roots == tuple(graph.outputs) and suffix.nodes == () and len(suffix.prefix) == len(graph.nodes)
    torch.testing.assert_close(resumed(graph, model, suffix, x), model(x))


def test_the_input_and_branches_can_be_boundary():
    def wiring(self, x):
        side = self.b(x)
        y = self.a(x).relu()
        return self.c(y + side + x)

    model, x = Wired(wiring, a=nn.Linear(5, 5), b=nn.Linear(5, 5), c=nn.Linear(5, 2)), normal(3, 5)
    graph = trace(model, x)
    (a,), (b,) = graph.calls("a.weight"), graph.calls("b.weight")
    suffix = cut(graph, [a])
    assert set(suffix.boundary) == {*graph.inputs, b}
    torch.testing.assert_close(resumed(graph, model, suffix, x), model(x))
