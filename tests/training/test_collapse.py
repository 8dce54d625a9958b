import logging
import math

import pytest
import torch
from torch import nn

from singe.task import Task
from singe.training.collapse import Watch

Y = torch.arange(12) % 4
RIGHT = 5.0 * nn.functional.one_hot(Y, 4)
X = torch.zeros(12, 1)


def answering(share):
    """The logits of a network that is sure and right on a share of the samples, and knows nothing of the others."""
    return torch.where(torch.arange(12)[:, None] < 12 * share, RIGHT, torch.zeros(4))


def loss_of(logits):
    return nn.functional.cross_entropy(logits, Y).item()


@pytest.mark.parametrize(("share", "collapsed"), [(1, False), (0.75, False), (0.25, True), (0, True)])
def test_less_than_half_of_what_was_known_is_a_collapse(share, collapsed, caplog):
    watch = Watch(answering(1), (X, Y), Task())
    with caplog.at_level(logging.WARNING, "singe"):
        watch.warn(loss := loss_of(answering(share)), ["prune less", "train"])
    assert [r.getMessage() for r in caplog.records] == [
        f"the pruned network may have collapsed: its loss on 12 samples is {loss:.3f}, it was {watch.loss:.3f} before "
        f"pruning, and a constant answer has {math.log(4):.3f}; remedies: prune less, train"
    ] * collapsed


def test_of_a_network_that_knew_nothing_only_far_worse_losses_are_told(caplog):
    watch = Watch(answering(0), (X, Y), Task())
    with caplog.at_level(logging.WARNING, "singe"):
        watch.warn(loss_of(torch.randn(12, 4)), [])
        assert not caplog.records
        watch.warn(1.9 * watch.loss, [])
        assert not caplog.records
        watch.warn(2.1 * watch.loss, [])
        watch.warn(math.nan, [])
    assert len(caplog.records) == 2


def test_where_outputs_have_no_mean_only_a_loss_that_is_not_finite_is_told(caplog):
    watch = Watch((answering(0),), (X, Y), Task(loss=lambda outputs, batch: outputs[0].square().mean()))
    with caplog.at_level(logging.WARNING, "singe"):
        watch.warn(10.0, [])
    assert not caplog.records


def test_a_loss_that_takes_no_constant_answer_is_not_compared_with_one(caplog):
    def loss(outputs, batch):
        if not outputs[:, 1:].all():
            raise ValueError("expected a scale > 0")
        return outputs.square().mean()

    watch = Watch(RIGHT + 1, (X, Y), Task(loss=loss))
    assert math.isfinite(watch.loss)
    watch.warn(100 * watch.loss, [])
    assert not caplog.records
