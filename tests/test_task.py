"""What a task makes of outputs, batches and losses; test_forward.py has the calls that it is a part of."""

import dataclasses
import math

import pytest
import torch
from networks import MLP, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

import singe
from singe.task import Task, cross_entropies, cross_entropy


def test_the_network_sees_x_of_a_pair_or_all_of_what_forward_takes():
    model, (x, y) = Wired(lambda self, x: self.a(x), a=nn.Linear(5, 4)), (normal(3, 5), torch.arange(3))
    assert Task().inputs((x, y)) is x
    assert torch.equal(Task().outputs(model, (x, y)), model(x))
    task = Task(lambda m, b: m(b["x"]), lambda o, b: F.cross_entropy(o, b["y"]))
    batch = {"x": x, "y": y}
    assert task.inputs(batch) is batch
    assert torch.equal(task(model, batch), Task()(model, (x, y)))


def test_a_loss_of_one_element_is_a_scalar():
    value = Task(loss=lambda o, b: o.mean().reshape(1, 1)).judge(normal(3, 4), None)
    assert value.shape == ()


@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), lambda o, b: o.logits.sum()], ids=["of (outputs, y)", "wrong attribute"]
)
def test_a_loss_that_takes_other_things_is_told_what_it_gets(loss):
    model, (x, y) = randomised(MLP()), (normal(6, 10), torch.arange(6) % 4)
    with pytest.raises(TypeError, match=r"loss\(outputs, batch\) -> scalar.*batch\[1\]"):
        singe.score(model, (x, y), "layers.0", loss=loss)


def halved(outputs, batch):
    return F.cross_entropy(outputs / 2, batch[1])


def halved_in_place(outputs, batch):
    return F.cross_entropy(outputs.div_(2), batch[1])


def test_a_loss_that_works_in_place_changes_neither_widths_nor_training():
    """Cached outputs are read again while widths are chosen, a student's by the distillation."""

    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(2))

        def forward(self, x):
            return torch.stack([self.a(x), self.b(x)], 2)

    loader = [(normal(16, 10), torch.arange(32).reshape(16, 2) % 4)]
    pure, in_place = (
        singe.prune(randomised(TwoHeads()), loader, 0.4, loss=loss, criterion="magnitude", images=16, progress=False,
                    compensation_images=16, finetune=singe.FineTune(4, distill=0.9))
        for loss in (halved, halved_in_place)
    )  # fmt: skip
    assert pure.plan.to_json() == in_place.plan.to_json()
    assert all(map(torch.equal, pure.model.parameters(), in_place.model.parameters()))


@dataclasses.dataclass
class Late:
    """What holds more than it is made of."""

    logits: torch.Tensor
    extra: torch.Tensor = dataclasses.field(init=False, default=None)


@dataclasses.dataclass
class Doubled:
    logits: torch.Tensor

    def __post_init__(self):
        self.logits = self.logits * 2


class Keyed(dict):
    def __init__(self, **items):
        super().__init__(**items)


class Answering(MLP):
    """Answers with objects that cannot be made anew of what they hold."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        answer = self.kind(logits=super().forward(x))
        if self.kind is Late:
            answer.extra = x.mean()
        return answer


def logits_of(outputs):
    return outputs["logits"] if isinstance(outputs, dict) else outputs.logits


def loss_of_objects(outputs, batch):
    return F.cross_entropy(logits_of(outputs), batch[1]) + (getattr(outputs, "extra", None) or 0)


@pytest.mark.parametrize("kind", [Late, Doubled, Keyed])
def test_a_loss_gets_the_outputs_that_the_model_returned(kind):
    model, few = randomised(Answering(kind)), (normal(8, 10), torch.arange(8) % 4)
    outputs = model(few[0])
    kept = logits_of(outputs).clone()

    def in_place(outputs, batch):
        assert type(outputs) is kind
        value = loss_of_objects(outputs, batch)
        logits_of(outputs).data.zero_()
        return value

    expected = loss_of_objects(outputs, few)
    assert torch.equal(Task(loss=in_place).judge(outputs, few), expected)
    assert torch.equal(logits_of(outputs), kept)
    result = singe.prune(model, [few], 0.3, structured=False, loss=loss_of_objects, images=8, progress=False)
    assert result.loss_before == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Late, "a new Late has another"), (Doubled, "a new Doubled has another"), (Keyed, r"Keyed cannot \(.*init.*\)")],
)
def test_objects_that_lose_something_when_they_are_made_anew_are_refused_where_that_is_done(kind, message):
    model, few = randomised(Answering(kind)), (normal(8, 10), torch.arange(8) % 4)
    with pytest.raises(ValueError, match=rf"made anew of what they hold, but {message}"):
        singe.score(model, few, "layers.0", loss=loss_of_objects)


@pytest.mark.parametrize("criterion", ["loss_change", "integrated_gradient", "magnitude"])
def test_a_loss_that_writes_to_the_batch_is_refused(criterion):
    model, (x, y) = randomised(MLP()), (normal(6, 10), normal(6, 4))
    with pytest.raises(ValueError, match="leave the batch as it is, but it writes to its tensors"):
        singe.prune(model, [(x, y)], 0.3, loss=lambda o, b: F.mse_loss(o, b[1].mul_(2)), criterion=criterion, images=6)


@pytest.mark.parametrize("y", [torch.randn(4, 3), torch.tensor([[1.0, 0, 1]] * 4), torch.full((4, 3), 0.2)])
def test_targets_that_are_no_classes_are_refused_by_the_default_loss(y):
    with pytest.raises(ValueError, match=r"class indices, or probabilities .* pass loss="):
        Task().judge(torch.zeros(4, 3), (None, y))
    with pytest.raises(ValueError, match="pass loss="):
        Task().judge(torch.zeros(4, 1), (None, y[:, :1]))
    with pytest.raises(ValueError, match="for regression or several labels"):
        singe.prune(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), [(torch.randn(4, 5), y)] * 3, 0.5, images=4)


TARGETS = {
    "classes": ((6, 5), torch.tensor([0, 4, 2, 2, 1, 3])),
    "some not counted": ((6, 5), torch.tensor([0, -100, 2, -100, 1, 3])),
    "bytes": ((6, 200), torch.tensor([156, 4, 156, 2, 1, 199], dtype=torch.uint8)),  # 156 is -100 as a byte
    "at every position": ((2, 4, 3, 2), torch.randint(4, (2, 3, 2), generator=torch.Generator().manual_seed(0))),
    "probabilities": ((6, 5), torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).softmax(1)),
    "probabilities at every position": (
        (2, 4, 3), torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("shape", "y"), TARGETS.values(), ids=TARGETS.keys())
def test_cross_entropies_of_several_networks_at_once_are_those_of_each(shape, y):
    logits = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    each = torch.stack([cross_entropy(own, (None, y)) for own in logits])
    at_once = cross_entropies(logits.flatten(0, 1), (None, y), 3)
    torch.testing.assert_close(at_once, each, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (at_once, each)))


@pytest.mark.parametrize("at_once", [False, True])
def test_a_shortage_is_not_taken_for_labels_that_do_not_fit(monkeypatch, at_once):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(F, "cross_entropy", full)
    logits, batch = torch.randn(4, 3), (None, torch.tensor([0, 2]))
    with pytest.raises(torch.OutOfMemoryError):
        cross_entropies(logits, batch, 2) if at_once else cross_entropy(logits[:2], batch)


def test_labels_that_do_not_fit_are_told_beside_the_logits_of_one_network():
    with pytest.raises(ValueError, match=r"fit logits of shape \(2, 3\), got y of shape \(2,\)"):
        cross_entropies(torch.randn(4, 3), (None, torch.tensor([0, 3])), 2)


def test_probabilities_of_classes_are_targets():
    y, outputs = torch.rand(4, 3).softmax(1), torch.randn(4, 3)
    assert torch.equal(Task().judge(outputs, (None, y)), F.cross_entropy(outputs, y))
    y, outputs = torch.rand(2, 3, 5).softmax(1), torch.randn(2, 3, 5)
    assert torch.equal(Task().judge(outputs, (None, y)), F.cross_entropy(outputs, y))


def test_a_batch_of_which_no_label_counts_teaches_nothing():
    layer, x, y = nn.Linear(3, 4), torch.randn(5, 3), torch.full((5,), -100)
    loss = Task().lesson(layer(x), (x, y))
    loss.backward()
    assert loss == 0 and not layer.weight.grad.any()
    y[0] = 1
    assert torch.equal(Task().lesson(layer(x), (x, y)), Task().judge(layer(x), (x, y)))
    with torch.no_grad():
        layer.weight.fill_(math.nan)
    assert Task().lesson(layer(x), (x, y)).isnan()


def test_a_loss_of_ones_own_is_what_is_minimised():
    x = torch.randn(2, 3)
    assert Task(loss=lambda outputs, batch: outputs.sum() * math.nan).lesson(x, (x, torch.full((2,), -100))).isnan()
