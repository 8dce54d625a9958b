import pytest
import torch
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

from singe.graph.point import find_points
from singe.graph.trace import trace


def test_every_use_of_a_layer_has_the_sum_that_its_output_is_a_term_of():
    def wiring(self, x):
        y = self.a(x).relu()
        return self.b(x) + y, self.b(y).sigmoid()

    graph = trace(Wired(wiring, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), normal(4, 3))
    first, second = find_points(graph, "b.weight")
    (total,) = first.layer.call.users
    assert first.total is total and first.other in total.all_input_nodes and first.other is not first.layer.call
    assert second.other is None and second.total is second.layer.output is second.layer.call
    assert [first.layer.call, second.layer.call] == graph.calls("b.weight")


WITHOUT = {
    "unused": (lambda self, x: self.a(x), "not used in eval mode"),
    "itself": (lambda self, x: self.b(self.b(x).relu()), "reads what it has written itself"),
    "product": (lambda self, x: self.a(x) * self.b.weight[0], "no convolution or linear layer but aten.select"),
    "both ways": (lambda self, x: self.up(x) + F.conv1d(x, self.up.weight), "used as different layers"),
    "in other groups": (
        lambda self, x: torch.cat([self.up(x), F.conv_transpose1d(x, self.up.weight, groups=3)], 1),
        "used as different layers",
    ),
}


@pytest.mark.parametrize(("wiring", "reason"), WITHOUT.values(), ids=WITHOUT.keys())
def test_a_weight_that_cannot_be_refitted_has_none(wiring, reason):
    up, weight = nn.ConvTranspose1d(3, 3, 1), "up.weight" if reason.endswith("layers") else "b.weight"
    model = Wired(wiring, a=nn.Linear(3, 3), b=nn.Linear(3, 3), up=up)
    assert reason in find_points(trace(model, normal(4, 3, *([5] if weight == "up.weight" else []))), weight)
