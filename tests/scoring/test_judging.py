import pytest
import torch
from networks import DigitNet, images, randomised
from torch.nn import functional as F

from singe.graph.trace import trace
from singe.scoring.judging import Judge
from singe.scoring.stacking import Stacking
from singe.task import Task


def judge(task):
    """A judge of a network's outputs on six images, and these images."""
    model = randomised(DigitNet(4)).double().eval()
    x, y = images(6, channels=1)
    x = x.double()
    graph = trace(model, x)
    return Judge(graph, Stacking(graph), task, (x, y)), (model, x, y)


@pytest.fixture(scope="module")
def stacked():
    """Of three jobs, the outputs of each and of all in a stack."""
    judged, (model, x, y) = judge(Task())
    each = [model(x * scale).detach() for scale in (1, 0.5, 2)]
    return judged, each, torch.cat(each), y


def test_every_job_has_a_loss_of_its_own(stacked):
    judged, each, together, y = stacked
    expected = torch.stack([F.cross_entropy(outputs, y) for outputs in each])
    assert torch.allclose(judged.losses([together], 3), expected, rtol=1e-12)


def test_gradients_are_those_of_the_losses_sum(stacked):
    judged, _, together, y = stacked
    leaf = together.clone().requires_grad_()
    (expected,) = torch.autograd.grad(3 * F.cross_entropy(leaf, y.repeat(3)), leaf)
    (found,) = judged.gradients([together], 3)
    assert torch.allclose(found, expected, rtol=1e-12) and not together.requires_grad


def test_a_loss_may_write_into_outputs(stacked):
    def loss(outputs, batch):
        outputs -= outputs.mean(1, keepdim=True)
        return F.cross_entropy(outputs, batch[1])

    _, each, together, y = stacked
    before = together.clone()
    found = judge(Task(loss=loss))[0].losses([together.requires_grad_()], 3)
    assert torch.equal(together, before)
    assert torch.allclose(found, torch.stack([F.cross_entropy(outputs, y) for outputs in each]), rtol=1e-12)
    together.requires_grad_(False)


def test_a_loss_may_depend_on_nothing_that_has_a_gradient(stacked):
    judged = judge(Task(loss=lambda outputs, batch: (outputs.argmax(1) == batch[1]).double().mean()))[0]
    outputs = [stacked[2].clone().requires_grad_()]
    assert not judged.summed(outputs, 3).requires_grad
    (gradient,) = judged.gradients(outputs, 3)
    assert not gradient.any() and gradient.shape == outputs[0].shape
