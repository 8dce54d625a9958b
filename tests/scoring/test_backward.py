import pytest
import torch

from singe.scoring.backward import gradients


def test_it_is_the_weighted_sum_of_what_has_a_gradient():
    x, other = torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, requires_grad=True)
    ends, weights = [x * x, x.detach() * 5, 3 * x], [torch.tensor([1.0, 10.0]), torch.ones(2), torch.ones(2)]
    at_x, at_other = gradients(ends, weights, [x, other])
    assert at_x.tolist() == [2 + 3, 40 + 3] and at_other.tolist() == [0, 0]


@pytest.mark.parametrize("weights", [None, [torch.tensor(2.0)]])
def test_it_is_zero_where_nothing_has_one(weights):
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (found,) = gradients([x.detach().sum()], weights, [x])
    assert found.tolist() == [0, 0, 0] and found.dtype == torch.float64
