import math
from functools import partial
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.task import Task
from singe.training import finetune
from singe.training.data import Stream
from singe.training.finetune import Tuner


def small_model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def small_stream():
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)
    return Stream(DataLoader(TensorDataset(x, y), batch_size=8), torch.device("cpu"))


def tuner_of(model, stages=1, loss=None, **options):
    plan = singe.FineTune(**{"distill": 0, **options})
    tuner = Tuner(plan, model, small_stream(), Task(loss=loss), unpruned=model)
    tuner.begin(stages)
    return tuner


@pytest.mark.parametrize("when", ["layer", "neuron", "after"])
@pytest.mark.parametrize(("steps", "stages"), [(10, 1), (10, 4), (3, 7), (1, 3), (12, 12)])
def test_steps_are_spread_evenly_and_add_up(steps, stages, when):
    seen = []

    def loss(outputs, batch):
        seen.append(1)
        return F.cross_entropy(outputs, batch[1])

    tuner = tuner_of(small_model(), stages, loss, steps=steps, when=when)
    taken = [tuner.train_stage() for _ in range(stages)]
    assert sum(taken) == len(seen) == steps
    assert max(taken) - min(taken) <= 1
    done = torch.tensor(taken).cumsum(0)
    assert all(abs(d - steps * (i + 1) / stages) <= 0.5 for i, d in enumerate(done.tolist()))


@pytest.mark.parametrize(("shortest", "expected"), [(2, [3, 3, 1, 3, 3, 1]), (4, [6, 1, 6, 1])])
def test_stages_can_be_trained_in_parts_that_end_with_an_epoch(monkeypatch, shortest, expected):
    monkeypatch.setattr(finetune, "SHORTEST", shortest)
    tuner, taken = tuner_of(small_model(), 2, steps=14), []  # an epoch has three batches
    while not tuner.finished:
        tuner._stream.restart(0)
        taken.append(tuner.train_stage(by_epoch=True))
        assert tuner.step == sum(taken)
    assert taken == expected


@pytest.mark.parametrize(
    ("cooldown", "expected"),
    [
        (0.5, [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (1.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (0.0, [1] * 10),
        (0.3, [1, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3]),
    ],
)
def test_the_learning_rate_is_flat_then_falls_linearly_over_the_whole_run(cooldown, expected):
    tuner, rates = tuner_of(small_model(), stages=3, steps=10, lr=0.05, cooldown=cooldown), []
    tuner.optimizer.register_step_pre_hook(lambda o, *_: rates.append([g["lr"] for g in o.param_groups]))
    for _ in range(3):
        tuner.train_stage()
    assert all(len(set(groups)) == 1 for groups in rates)
    assert [groups[0] for groups in rates] == pytest.approx([0.05 * e for e in expected])


def test_training_lowers_the_loss_and_leaves_eval_mode_and_no_gradients_behind():
    model, stream = small_model(), small_stream()
    x, y = stream.take(24)
    before, modes = F.cross_entropy(model(x), y).item(), []
    model.register_forward_pre_hook(lambda m, _: modes.append(m.training))
    tuner_of(model, steps=40, lr=0.05).train_stage()
    assert modes == [True] * 40
    assert not any(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert F.cross_entropy(model(x), y).item() < 0.8 * before


@pytest.mark.parametrize(
    ("name", "lr", "make"),
    [
        ("sgd", 0.1, partial(torch.optim.SGD, momentum=0.8, nesterov=True)),
        ("adamw", 0.01, partial(torch.optim.AdamW, betas=(0.8, 0.999))),
    ],
)
def test_a_step_is_that_of_the_optimizer_with_decay_on_weights_only(name, lr, make):
    tuned, plain, stream = small_model(), small_model(), small_stream()
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() <= 1]
    optimizer = make([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}], lr=lr)
    plain.train()
    for _ in range(5):
        x, y = stream.next()
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    tuner_of(tuned, steps=5, optimizer=name, lr=lr, momentum=0.8, weight_decay=0.1, cooldown=0).train_stage()
    for (name, a), b in zip(tuned.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_without_a_gradient_weights_decay_and_biases_and_norms_stay():
    model = small_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    how = {"steps": 4, "lr": 0.1, "weight_decay": 0.5, "momentum": 0, "cooldown": 0}
    tuner_of(model, loss=lambda o, b: o.sum() * 0, **how).train_stage()
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name] * (0.95**4 if p.dim() > 1 else 1)), name


def test_parameters_that_require_no_gradient_do_not_move():
    model = small_model()
    model[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    tuner_of(model, steps=5, weight_decay=0.5).train_stage()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]


def test_training_works_inside_no_grad():
    model = small_model()
    before = model[0].weight.clone()
    with torch.no_grad():
        tuner_of(model, steps=2).train_stage()
        assert not torch.is_grad_enabled()
    assert not torch.equal(model[0].weight, before)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="finetune=None"):
        tuner_of(small_model().requires_grad_(False))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_leaves_eval_mode_and_sound_weights(value):
    model, seen = small_model(), []

    def loss(outputs, batch):
        seen.append(1)
        return F.cross_entropy(outputs, batch[1]) * (value if len(seen) == 4 else 1)

    tuner = tuner_of(model, 2, loss, steps=6)
    tuner.train_stage()
    with pytest.raises(ValueError, match=rf"{value} at fine-tuning step 4 of 6.*lr than 0\.02"):
        tuner.train_stage()
    assert not any(m.training for m in model.modules())
    assert all(p.isfinite().all() and p.grad is None for p in model.parameters())


def test_a_loss_is_waited_for_after_the_backward_pass_and_before_the_step(monkeypatch):
    order, original = [], finetune._fetched

    def fetched(value):
        order.append("asked")
        return lambda: order.append("fetched") or original(value)()

    monkeypatch.setattr(finetune, "_fetched", fetched)
    model = small_model()
    model[0].weight.register_hook(lambda _: order.append("backward"))
    tuner = tuner_of(model, steps=2)
    tuner.optimizer.register_step_pre_hook(lambda *_: order.append("step"))
    tuner.train_stage()
    assert order == ["asked", "backward", "fetched", "step"] * 2


def test_a_value_of_a_gpu_is_waited_for_alone(monkeypatch):
    value, stream, there = MagicMock(), MagicMock(), torch.tensor(2.5)
    value.device.type, value.to.return_value = "cuda", there
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream if device is value.device else None)
    event = stream.record_event.return_value
    fetch = finetune._fetched(value)
    value.to.assert_called_once_with("cpu", non_blocking=True)
    event.synchronize.assert_not_called()
    assert fetch() is there
    event.synchronize.assert_called_once_with()


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_a_run_that_goes_on_takes_the_steps_that_are_left(done):
    tuner = tuner_of(small_model(), steps=10)
    tuner.begin(4, done)
    assert sum(tuner.train_stage() for _ in range(4 - done)) == 10 - round(10 * done / 4)


def test_a_zero_share_of_the_steps_trains_nothing_and_does_not_touch_the_statistics():
    model = small_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuner = tuner_of(model, stages=5, steps=1)
    assert tuner.train_stage() == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("steps", 0, ValueError),
        ("steps", -1, ValueError),
        ("steps", 10.0, TypeError),
        ("steps", True, TypeError),
        ("when", "epoch", ValueError),
        ("when", None, ValueError),
        ("lr", 0.0, ValueError),
        ("lr", -0.1, ValueError),
        ("lr", math.nan, ValueError),
        ("lr", math.inf, ValueError),
        ("momentum", 1.0, ValueError),
        ("momentum", -0.1, ValueError),
        ("weight_decay", -1e-4, ValueError),
        ("weight_decay", math.nan, ValueError),
        ("cooldown", 1.1, ValueError),
        ("cooldown", -0.1, ValueError),
        ("optimizer", "adam", ValueError),
    ],
)
def test_bad_arguments_are_refused_by_name(option, value, kind):
    with pytest.raises(kind, match=rf"\b{option}\b"):
        singe.FineTune(**{option: value})


def test_learning_rates_of_sgd_are_refused_for_adamw():
    assert singe.FineTune(optimizer="adamw").learning_rate == 2e-4 and singe.FineTune().learning_rate == 0.02
    assert singe.FineTune(optimizer="adamw", lr=1e-3).learning_rate == 1e-3
    with pytest.raises(ValueError, match=r"expected lr <= 0\.01 with optimizer='adamw', .* got 0\.02"):
        singe.FineTune(optimizer="adamw", lr=0.02)


def test_the_boundaries_of_the_arguments_are_allowed():
    plan = singe.FineTune(steps=1, momentum=0.0, weight_decay=0.0, cooldown=0.0)
    assert tuner_of(small_model(), **vars(plan)).train_stage() == 1


def test_steps_in_bfloat16_compute_in_it_and_keep_weights_and_the_loss_wide():
    model, seen = small_model(), []
    model[0].register_forward_hook(lambda m, x, y: seen.append((torch.is_autocast_enabled("cpu"), y.dtype)))
    losses = []

    def loss(outputs, batch):
        losses.append(F.cross_entropy(outputs, batch[1]))
        return losses[-1]

    tuner_of(model, loss=loss, steps=3, precision="bfloat16").train_stage()
    assert seen == [(True, torch.bfloat16)] * 3
    assert not torch.is_autocast_enabled("cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {value.dtype for value in losses} == {torch.float32}


def test_bfloat16_trains_about_as_float32_does():
    tuned = {}
    for precision in (None, "bfloat16"):
        tuned[precision] = small_model()
        tuner_of(tuned[precision], steps=10, lr=0.05, distill=0.5, precision=precision).train_stage()
    a, b = (m[0].weight for m in tuned.values())
    start = small_model()[0].weight
    assert 0 < (a - b).norm() < 0.1 * (a - start).norm()


def test_a_precision_of_training_is_refused_before_work_where_it_cannot_be_had():
    with pytest.raises(ValueError, match="expected precision 'float32', 'tf32' or 'bfloat16', got 'half'"):
        singe.FineTune(precision="half")
    x, y = small_stream().take(8)
    with pytest.raises(ValueError, match="expected precision 'tf32' with a model on a CUDA device"):
        singe.prune(small_model(), [(x, y)], 0.5, finetune=singe.FineTune(precision="tf32"))


def stream_of(count, **options):
    data = TensorDataset(torch.randn(count, 6), torch.arange(count) % 3)
    return Stream(DataLoader(data, batch_size=8, **options), torch.device("cpu"))


def test_a_last_batch_of_one_sample_is_found_out_at_the_rehearsal():
    for count, options in ((16, {}), (17, {"drop_last": True}), (18, {})):
        Tuner(singe.FineTune(), small_model(), stream_of(count, **options), Task(), unpruned=small_model()).rehearse()
    Tuner(singe.FineTune(2), small_model(), stream_of(17), Task(), unpruned=small_model()).rehearse()  # never drawn
    tuner = Tuner(singe.FineTune(3), small_model(), stream_of(17), Task(), unpruned=small_model())
    with pytest.raises(ValueError, match=r"on batches of .*\(1, 6\).*try drop_last=True"):
        tuner.rehearse()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"optimizer": "adamw"}], ids=str)
def test_sparse_gradients_are_found_out_at_the_rehearsal(options):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    stream = Stream([(torch.arange(6), torch.arange(6) % 3)], torch.device("cpu"))

    def tuner():
        return Tuner(singe.FineTune(1, **options), model, stream, Task(), unpruned=model)

    with pytest.raises(ValueError, match=r"can be trained, .*: expected dense gradients, got .* of 0\.weight"):
        tuner().rehearse()
    model[0].sparse = False
    tuner().rehearse()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_rehearsal_takes_a_step_of_a_copy_alone(optimizer, monkeypatch):
    stepped, make = [], finetune._optimizer

    def watched(how, trained):
        made = make(how, trained)
        made.register_step_post_hook(lambda *_: stepped.append(made))
        return made

    monkeypatch.setattr(finetune, "_optimizer", watched)
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tuner = tuner_of(model, optimizer=optimizer)
    tuner.rehearse()
    assert len(stepped) == 1 and stepped[0] is not tuner.optimizer and not tuner.optimizer.state
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not any(m.training for m in model.modules())


def test_an_optimizer_that_cannot_step_is_found_out_at_the_rehearsal(monkeypatch):
    def fails(self, closure=None):
        raise RuntimeError("not implemented for this device")

    tuner = tuner_of(small_model())
    monkeypatch.setattr(torch.optim.SGD, "step", fails)
    with pytest.raises(ValueError, match=r"can be trained, .*: not implemented for this device"):
        tuner.rehearse()


class Auxiliary(nn.Module):
    """Has a second head in train mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return (self.a(x), self.b(x)) if self.training else self.a(x)


def test_outputs_of_train_mode_alone_that_the_loss_does_not_take_are_told_as_such():
    tuner = Tuner(singe.FineTune(), Auxiliary(), small_stream(), Task(), unpruned=Auxiliary())
    with pytest.raises(TypeError, match=r"in train mode, on batches of .* got tuple"):
        tuner.rehearse()


def test_a_tenth_of_the_steps_at_a_time_the_log_says_how_far_it_is(caplog):
    tuner = Tuner(singe.FineTune(20), small_model(), small_stream(), Task(), unpruned=small_model(), progress=True)
    with caplog.at_level("INFO", "singe"):
        tuner.train_stage()
    assert [m.split(",")[0] for m in caplog.messages] == [f"fine-tuning: {n} of 20 steps" for n in range(2, 21, 2)]


class Recomputed(nn.Module):
    """A network whose middle is computed again in the backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x).relu()
        if self.training and self.reentrant is not None:
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        else:
            x = self.middle(x)
        return self.last(x.relu())


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_computed_again_in_the_backward_pass_is_trained_like_anything_else(reentrant):
    found = []
    for model in (Recomputed(None), Recomputed(reentrant)):
        tuner = tuner_of(model, steps=4)
        tuner.rehearse()
        tuner._stream.restart(0)
        tuner.train_stage()
        found.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(f.values() for f in found), strict=True))


def test_a_batch_without_labels_ends_no_training():
    x, y = torch.randn(8, 6), torch.full((8,), -100)
    model = small_model()
    stream = Stream([(x, y)], torch.device("cpu"))
    tuner = Tuner(singe.FineTune(steps=2, distill=0, weight_decay=0), model, stream, Task(), unpruned=model)
    before = [p.clone() for p in model.parameters()]
    assert tuner.train_stage() == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
