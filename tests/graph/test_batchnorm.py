import pytest
import torch
from networks import PlainNet, images, randomised
from torch import nn
from wiring import Wired, normal

from singe.graph.batchnorm import affine, following, is_batch_norm, owned_tensor
from singe.graph.trace import trace


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
