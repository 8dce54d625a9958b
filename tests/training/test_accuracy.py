import pytest
import torch
from states import random_states, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from singe.training.accuracy import accuracy


class Told(nn.Module):
    """Answers with the logits that it gets; in train mode with their opposite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return -x if self.training else x * self.scale


def logits(*classes):
    return torch.eye(3)[list(classes)]


def test_it_is_the_share_of_right_answers_whatever_the_sizes_of_batches():
    batches = [(logits(0, 1, 2), torch.tensor([0, 1, 1])), (logits(2), torch.tensor([2]))]
    assert accuracy(Told(), batches) == 0.75


def test_labels_of_every_pixel_count_each():
    x = logits(0, 1).reshape(2, 3, 1, 1).expand(2, 3, 2, 2)
    y = torch.tensor([[[0, 0], [0, 1]], [[1, 2], [2, 2]]])
    assert accuracy(Told(), [(x, y)]) == 0.5


def test_a_loader_that_shuffles_leaves_random_states_alone():
    dataset = TensorDataset(logits(0, 1, 2), torch.arange(3))
    for generator in (None, torch.Generator()):
        loader = DataLoader(dataset, batch_size=2, shuffle=True, generator=generator)
        before = random_states(*([] if generator is None else [generator]))
        assert accuracy(Told(), loader) == 1
        assert same(random_states(*([] if generator is None else [generator])), before)


def test_it_is_measured_in_eval_mode_and_leaves_all_modes_alone():
    model = nn.Sequential(Told(), nn.Identity().eval())
    assert accuracy(model, [(logits(0, 1), torch.tensor([0, 1]))]) == 1
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "expected batches .* got none"),
        ([logits(0)], r"expected batches \(x, y\) to measure accuracy on, got Tensor"),
        ([(logits(0), torch.zeros(1, 1))], r"labels of shape \(1, 1\).*got \(1, 3\)"),
        ([(torch.zeros(1), torch.zeros(1))], r"got \(1,\)"),
    ],
)
def test_what_has_no_accuracy_is_refused(batches, message):
    with pytest.raises((TypeError, ValueError), match=message):
        accuracy(Told(), batches)


def test_labels_that_the_default_loss_ignores_do_not_count():
    x = logits(0, 1).reshape(2, 3, 1, 1).expand(2, 3, 2, 2)
    y = torch.tensor([[[0, -100], [-100, 1]], [[-100, 2], [2, 1]]])
    assert accuracy(Told(), [(x, y)]) == 2 / 5
    with pytest.raises(ValueError, match="labels other than -100 to measure accuracy on, got none"):
        accuracy(Told(), [(x, torch.full_like(y, -100))])
