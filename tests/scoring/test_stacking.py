import pytest
import torch
from torch import nn

from singe.graph.trace import trace
from singe.scoring.stacking import Stacking


class Several(nn.Module):
    """Outputs with the batch along axis 0, along axis 1, flattened into axis 0, along two axes, and without it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * 2, x.mT, x.reshape(-1), x @ x.mT, self.weight * 2


@pytest.fixture
def stacking():
    graph = trace(Several(), torch.randn(4, 3))
    return Stacking(graph), dict(zip(("first", "second", "flat", "square", "none"), graph.outputs, strict=True))


@pytest.mark.parametrize(("name", "shape"), [("first", (4, 3)), ("second", (3, 4)), ("flat", (12,)), ("none", (3,))])
def test_what_is_stacked_and_cut_comes_back(stacking, name, shape):
    stack, node = stacking[0], stacking[1][name]
    value = torch.randn(shape)
    stacked = stack.stack(node, value, 3)
    axis = {"first": 0, "second": 1, "flat": 0}.get(name)
    assert stacked.shape == tuple(3 * s if i == axis else s for i, s in enumerate(shape))
    assert all(torch.equal(part, value) for part in stack.unstack(node, stacked, 3))
    parts = stack.split(node, value, [1, 3])
    if axis is not None:
        assert [p.shape[axis] for p in parts] == [shape[axis] // 4, shape[axis] // 4 * 3]
    assert torch.equal(stack.join(node, parts), value)


def test_a_value_of_pairs_of_samples_stands_alone(stacking):
    stack, node = stacking[0], stacking[1]["square"]
    value = torch.randn(4, 4)
    assert stack.stack(node, value, 1) is value
    with pytest.raises(ValueError, match="along several axes"):
        stack.stack(node, value, 2)
