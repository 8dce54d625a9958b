import copy

import pytest
import torch
from networks import PlainNet, images, randomised
from torch import nn
from wiring import Wired, normal

from singe.graph.batchnorm import affine, following, is_batch_norm, norm_at, owned_tensor, restate
from singe.graph.trace import named_tensors, trace


@pytest.fixture(scope="module")
def plain():
    model = randomised(PlainNet())
    return model, trace(model, images()[0])


@pytest.mark.parametrize(("conv", "norm"), [("features.0", "features.1"), ("features.4", "features.5")])
def test_scale_and_shift_are_those_of_the_module(plain, conv, norm):
    model, graph = plain
    (call,) = graph.calls(f"{conv}.weight")
    node = following(call)
    assert is_batch_norm(node)
    found, module = affine(node, graph.live(model)), model.get_submodule(norm)
    x = normal(2, module.num_features, 3, 3)
    ours = x * found.scale[:, None, None] + found.shift[:, None, None]
    torch.testing.assert_close(ours, module(x))
    assert model.get_parameter(owned_tensor(graph, node)) is module.weight if module.affine else True


def test_a_batch_norm_without_weight_is_recognised_by_its_statistics(plain):
    _, graph = plain
    (call,) = graph.calls("features.4.weight")
    assert owned_tensor(graph, following(call)) == "features.5.running_mean"


def test_no_batch_norm_follows_where_something_else_does_or_also_reads():
    def wiring(self, x):
        y = self.a(x)
        return self.b(self.n(y).relu() + y)

    model = Wired(wiring, a=nn.Linear(4, 5), n=nn.BatchNorm1d(5), b=nn.Linear(5, 2))
    graph = trace(model, normal(3, 4))
    for name in ("a", "b"):
        (call,) = graph.calls(f"{name}.weight")
        assert following(call) is None


def test_restated_statistics_are_of_what_is_seen_and_nothing_else_is_put_out():
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double()
    x = normal(50, 3, dtype=torch.float64) + 2
    graph, before = trace(model, x), model(x)
    (node,) = (n for n in graph.nodes if is_batch_norm(n))
    assert not torch.allclose(copy.deepcopy(model).train()(x), before, atol=0.1)
    with torch.no_grad():
        seen = model[0](x)
        restate(norm_at(graph, [node]), named_tensors(model), seen.mean(0), seen.var(0, correction=0))
    torch.testing.assert_close(model(x), before)
    torch.testing.assert_close(copy.deepcopy(model).train()(x), before)
    torch.testing.assert_close(model[1].running_mean, seen.mean(0))
    torch.testing.assert_close(model[1].running_var, seen.var(0, correction=0))


def test_a_norm_that_sees_several_layers_or_lacks_a_tensor_is_not_restated():
    def wiring(self, x):
        return self.plain(self.twice(self.a(x))) + self.twice(self.b(x)) + self.once(self.b(x))

    norms = {"twice": nn.BatchNorm1d(4), "once": nn.BatchNorm1d(4), "plain": nn.BatchNorm1d(4, affine=False)}
    graph = trace(Wired(wiring, a=nn.Linear(4, 4), b=nn.Linear(4, 4), **norms), normal(3, 4))
    found = [norm_at(graph, [n]) for n in graph.nodes if is_batch_norm(n)]
    assert [norm and norm.mean for norm in found].count("once.running_mean") == 1
    assert sum(norm is None for norm in found) == 3
    assert norm_at(graph, graph.calls("a.weight")) is None
    assert norm_at(graph, graph.calls("twice.weight")).mean == "twice.running_mean"
