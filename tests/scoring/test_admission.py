import pytest
import torch
from torch import nn

import singe
from singe.scoring.admission import check_loss
from singe.task import Task

SEEN = []


class Watched(nn.Linear):
    """Keeps what it computes, as a hook would."""

    def forward(self, x):
        SEEN[:] = [super().forward(x)]
        return SEEN[0]


def test_a_loss_that_sees_more_than_the_outputs_is_refused():
    torch.manual_seed(0)
    model, batch = Watched(2, 4), (torch.randn(6, 2), torch.zeros(6, dtype=torch.int64))
    assert singe.score(model, batch, "", criterion="magnitude", loss=lambda o, b: SEEN[0].mean()).shape == (4,)
    for loss in (
        lambda outputs, batch: outputs.square().mean() + SEEN[0].abs().mean(),
        lambda outputs, batch: (outputs - SEEN[0]).square().mean(),
    ):
        with pytest.raises(ValueError, match="outputs and the batch alone, but it depends on what else"):
            check_loss(model, batch, Task(loss=loss), gradients=False)
        with pytest.raises(ValueError, match="outputs and the batch alone"):
            singe.score(model, batch, "", loss=loss)
    for loss in (
        None,
        lambda outputs, batch: outputs.mean() + torch.rand(()),  # may differ from call to call
        lambda outputs, batch: outputs.mean() + model.weight.norm(),
    ):
        check_loss(model, batch, Task(loss=loss), gradients=False)


def test_models_and_losses_of_whole_batches_are_tried_on_those():
    model, batch = nn.Linear(2, 4), (torch.randn(24, 2), torch.zeros(24, dtype=torch.int64))
    check_loss(model, batch, Task(loss=lambda outputs, _: outputs.view(24, 4).square().mean()), gradients=True)
    task = Task(forward=lambda m, b: m(b[0].view(24, 2)), loss=lambda o, _: o.mean())
    check_loss(model, batch, task, gradients=True)
