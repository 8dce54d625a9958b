import pytest
import torch
from torch import nn

import singe
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


class Shared(nn.Linear):
    """Is its own copy, as of a backbone that all copies of a model are to share."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize(
    "call", [singe.inspect, singe.fold_batchnorm, lambda m, x: singe.prune(m, [(x, x[:, 0].long())], 0.3)]
)
def test_a_module_that_copies_share_is_refused_before_it_is_touched(call):
    model = nn.Sequential(Shared(3, 8), nn.ReLU(), nn.Linear(8, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"the copy shares 0\.weight, 0\.bias with it"):
        call(model, torch.rand(4, 3))
    assert model[0].out_features == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
