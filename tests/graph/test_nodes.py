import torch
from networks import Experts
from torch import nn

from singe.graph.nodes import argument, described, kind_of, packet_of, place_of, selectors
from singe.graph.operators import aten
from singe.graph.trace import trace


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x):
        return torch.relu(self.layer(x))


def test_a_node_tells_where_it_stands_and_what_it_does():
    graph = trace(nn.Sequential(nn.Identity(), Block()).eval(), torch.randn(2, 3, 8, 8))
    conv, relu = graph.nodes
    assert packet_of(conv) is aten.conv2d and packet_of(graph.inputs[0]) is None
    assert (place_of(conv), kind_of(conv)) == ("1.layer", "Conv2d")
    assert (place_of(relu), kind_of(relu)) == ("1", "Block")
    assert described(conv) == "aten.conv2d.default in 1.layer"
    assert argument(conv, 3, "stride", 1) == [2, 2] and argument(conv, 6, "groups", 1) == 1


def test_the_model_itself_has_no_name():
    graph = trace(Block().eval(), torch.randn(2, 3, 8, 8))
    assert place_of(graph.nodes[-1]) == "" and described(graph.nodes[-1]) == "aten.relu.default"


def test_what_decides_which_samples_an_expert_sees_is_found():
    graph = trace(Experts(), torch.randn(5, 6))
    (first,), (head,) = graph.calls("experts.1.2.weight"), graph.calls("head.weight")
    (chosen,) = selectors(first)
    assert chosen.target is aten.eq.Scalar and chosen.args[1] == 1
    assert selectors(head) == []


class Nonzero(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return x.sum() + self.layer(x[torch.nonzero(x[:, 0].relu())[:, 0]]).sum()


def test_floating_point_numbers_decide_where_nothing_else_does():
    graph = trace(Nonzero().eval(), torch.randn(5, 4))
    (call,) = graph.calls("layer.weight")
    assert aten.relu.default in [node.target for node in selectors(call)]
