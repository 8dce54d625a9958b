import math

import pytest
import torch

from singe.models.numerics import distance

inf = math.inf


@pytest.mark.parametrize(
    ("actual", "expected", "share"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1.0, -inf], [2.0, -inf], 0.5),
        ([1.0, inf], [1.0, 1.0], inf),
        ([1.0], [1.0, 1.0], inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], inf),
        ([1, 2], [1, 2], 0.0),
        ([1, 2], [1, 200], inf),
    ],
)
def test_distance_is_the_largest_share(actual, expected, share):
    actual, expected = torch.tensor(actual), torch.tensor(expected)
    assert distance(actual, expected) == share
    assert distance([actual, {"x": expected}], [actual, {"x": expected}]) == 0


def test_outputs_of_another_number_are_far_apart():
    assert distance([torch.ones(1)], [torch.ones(1), torch.ones(1)]) == inf
