import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import singe
from singe.task import Task, cross_entropy
from singe.training.data import Stream
from singe.training.distillation import TEMPERATURE, Teacher, divergence
from singe.training.finetune import DISTILLED, Tuner


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 6, generator=generator), torch.randint(3, (7,), generator=generator)


def written_out(ours, theirs):
    """The divergence for one sample and position after the other, in float64."""
    ours, theirs = (t.double().movedim(1, -1).reshape(-1, t.shape[1]) for t in (ours, theirs))
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        q, p = (torch.exp(v / TEMPERATURE) / torch.exp(v / TEMPERATURE).sum() for v in (a, b))
        total += float((p * (p / q).log()).sum())
    return TEMPERATURE**2 * total / len(ours)


@pytest.mark.parametrize("head", [nn.Linear(6, 3), nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 2))])
def test_the_divergence_is_the_mean_over_samples_and_positions_of_softened_answers(head):
    wanted = head(batch()[0]).detach()
    outputs = wanted + torch.randn(wanted.shape)
    assert float(divergence(outputs, wanted)) == pytest.approx(written_out(outputs, wanted), rel=1e-5)
    assert float(divergence(wanted, wanted)) == pytest.approx(0, abs=1e-6)


def test_the_teacher_answers_in_eval_mode_and_is_what_the_network_was():
    model = classifier().train()
    x, y = batch()
    teacher, then = Teacher(model, Task(), 1.0, 0.0), copy.deepcopy(model).eval()(x)
    assert model.training
    with torch.no_grad():
        model[0].weight.zero_()
    assert teacher.loss(torch.tensor(9.0), then, {}, (x, y)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("distill", "share"), [(None, DISTILLED), (0, 0), (0.3, 0.3), (1, 1)])
def test_the_gradient_is_that_of_both_losses_by_their_shares(distill, share):
    model, unpruned, (x, y) = classifier().eval(), classifier(5).eval(), batch()
    seen: list[torch.Tensor] = []
    stream = Stream([(x, y)], torch.device("cpu"))
    plan = singe.FineTune(steps=1, lr=1e-3, weight_decay=0, momentum=0, cooldown=0, distill=distill)
    tuner = Tuner(plan, model, stream, Task(), ["1"], unpruned=unpruned)
    parameters = list(model.parameters())
    tuner.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in parameters))
    ours, theirs = model(x), unpruned(x).detach()
    kl = F.kl_div((ours / TEMPERATURE).log_softmax(1), (theirs / TEMPERATURE).softmax(1), reduction="batchmean")
    loss = (1 - share) * F.cross_entropy(ours, y) + share * TEMPERATURE**2 * kl
    expected = torch.autograd.grad(loss, parameters)
    tuner.train_stage()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen, expected, strict=True))


def test_a_loss_of_ones_own_is_not_mixed_with_answers_unless_asked_for():
    own = Task(loss=lambda outputs, batch: cross_entropy(outputs, batch))
    assert singe.FineTune().distilled(own) == 0 and singe.FineTune(distill=0.2).distilled(own) == 0.2
    assert singe.FineTune().distilled(Task()) == DISTILLED


class Pair(nn.Module):
    def __init__(self, head, both):
        super().__init__()
        self.head, self.both = head, both

    def forward(self, x):
        y = self.head(x)
        return (y, y) if self.both or (self.training and self.both is None) else y


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Pair(nn.Linear(6, 3), True), "logits .* got tuple; pass distill=0"),
        (Pair(nn.Linear(6, 3), None), "logits .* got tuple; pass distill=0"),
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), r"got \(7,\) torch.float32; pass distill=0"),
    ],
)
def test_networks_without_logits_are_refused_before_work_starts(model, message):
    def loss(outputs, batch):
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return outputs.square().mean()

    hidden = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), model)
    with pytest.raises(ValueError, match=message):
        singe.prune(
            hidden, [batch()], 0.3, loss=loss, finetune=singe.FineTune(2, distill=0.5), progress=False, images=7
        )


@pytest.mark.parametrize("distill", [-0.1, 1.1, float("nan"), "half"])
def test_shares_out_of_range_are_refused(distill):
    with pytest.raises((ValueError, TypeError), match="distill"):
        singe.FineTune(distill=distill)


def test_what_a_pruned_network_learns_from_is_the_unpruned_one():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(256, 6)
    loader = [(part, torch.randint(3, (64,))) for part in x.split(64)]  # labels that say nothing

    def apart(distill):
        plan = singe.FineTune(60, lr=0.05, when="after", distill=distill)
        small = singe.prune(model, loader, 0.6, criterion="magnitude", finetune=plan, progress=False).model
        return float((small(x).log_softmax(1) - model(x).log_softmax(1)).square().mean())

    assert apart(1.0) < 0.5 * apart(0.0)
