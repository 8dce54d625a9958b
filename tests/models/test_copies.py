import torch
from torch import nn

from singe.models.copies import copy_of


class Keeps(nn.Module):
    """Holds on to what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 2), None

    def forward(self, x):
        self.last = self.layer(x)
        return self.last.relu()


def test_what_a_forward_pass_left_behind_is_copied_without_its_history():
    model = Keeps()
    model(torch.randn(4, 3))
    copied = copy_of(model)
    assert torch.equal(copied.last, model.last) and copied.last is not model.last
    assert copied.last.grad_fn is None and model.last.grad_fn is not None
    assert copied.layer.weight is not model.layer.weight
