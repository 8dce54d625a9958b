import pytest
import torch
from networks import randomised
from wiring import BiasedAttention, normal

import singe
from singe import reference


@pytest.mark.parametrize("criterion", ["integrated_gradient", "loss_change"])
def test_what_a_table_has_for_a_head_fades_with_it(criterion):
    model, x = randomised(BiasedAttention()).double().eval(), normal(3, 7, 5, dtype=torch.float64)

    def loss(outputs, batch):
        return (outputs - batch[1]).square().mean()

    batch = (x, normal(3, 7, 5, seed=4, dtype=torch.float64))
    actual, expected = (
        way(model, batch, "qkv", criterion=criterion, loss=loss) for way in (singe.score, reference.score)
    )
    assert len(actual) == 3 and torch.allclose(actual, expected, rtol=1e-9, atol=0)
