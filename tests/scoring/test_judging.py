import logging

import pytest
import torch
from networks import DigitNet, images, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

from singe.graph.trace import trace
from singe.memory import Memory
from singe.models.outputs import leaves
from singe.scoring.judging import Judge, outputs_in_parts
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


def test_samples_that_pass_in_parts_get_the_same_outputs():
    class Named(DigitNet):
        def forward(self, x):
            logits = super().forward(x)
            return {"logits": logits, "by class": [logits.T]}

    model, task, seen = randomised(Named(4)).double().eval(), Task(), []
    model.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, y = images(7, channels=1)
    graph, batch = trace(model, x.double()), (x.double(), y)
    whole = task.outputs(model, batch)
    for share, sizes in ((1, [7]), (0.5, [3, 3, 1]), (0.01, [1] * 7)):
        room = int(8 * graph.largest() * 7 / graph.example_batch * share) + 1
        seen.clear()
        found = outputs_in_parts(model, graph, batch, task, Memory("loss", room, x.device))
        assert list(map(len, seen))[-len(sizes) :] == sizes
        assert torch.allclose(found["logits"], whole["logits"], rtol=1e-12)
        assert torch.equal(found["by class"][0], found["logits"].T)


def test_outputs_that_no_sample_owns_are_not_joined():
    class Centred(DigitNet):
        def forward(self, x):
            return super().forward(x), self.head.weight

    model = randomised(Centred(4)).eval()
    x, y = images(6, channels=1)
    found = outputs_in_parts(model, trace(model, x), (x, y), Task(), Memory("loss", 1, x.device))
    assert torch.equal(found[1], model.head.weight)


class Odd(dict):
    def __init__(self, *, logits):
        super().__init__(logits=logits)


MIXED = {
    "centred": lambda self, x: self.b(self.a(x[:, 0])) - self.b(self.a(x[:, 0])).mean(0),
    "steps first": lambda self, x: self.b(self.a(x.transpose(0, 1)).relu()).reshape(-1, 3),
    "in pairs": lambda self, x: self.b(self.a(x[:, 0]).relu()).view(-1, 2, 3),
    "of a class that is not made anew": lambda self, x: Odd(logits=self.b(self.a(x[:, 0]))),
}


@pytest.mark.parametrize("wiring", MIXED.values(), ids=MIXED.keys())
def test_samples_that_do_not_stand_alone_pass_together(wiring, caplog):
    model, x = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(6, 3)).eval(), normal(8, 5, 4)
    graph = trace(model, x)
    with caplog.at_level(logging.INFO, "singe"):
        found = outputs_in_parts(model, graph, (x, x), Task(), Memory("loss", 1, x.device))
    assert type(found) is type(model(x))
    assert torch.equal(*(leaves(outputs)[0] for outputs in (found, model(x))))
    assert "samples cannot be passed in parts" in caplog.text or not graph.dynamic


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
