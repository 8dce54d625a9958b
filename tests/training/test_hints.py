import copy

import pytest
import torch
from networks import Experts, images, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

import singe
from singe.task import Task
from singe.training.data import Stream
from singe.training.finetune import Tuner
from singe.training.hints import Hints, reading


class Net(nn.Module):
    """A stem, two branches of which one is depthwise, and a head that is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.deep, self.up = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ConvTranspose2d(6, 4, 2)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.wide(x).mean((2, 3)) + self.up(self.deep(x).relu()).mean((2, 3)))


READ = ("stem", "wide", "up", "head")


@pytest.fixture
def pruned():
    """A network and what is left of it, which no longer is what it was; the plan; a batch."""
    model, batch = randomised(Net()).eval(), images(5)
    found = singe.prune(model, [batch], 0.4, criterion="random", finetune=None, images=5, progress=False)
    assert {r.group for r in found.plan.removals} == {"stem", "wide"}
    return model, randomised(found.model, seed=4).eval(), found.plan, batch


def read_by(model, x):
    with reading(model) as seen:
        model(x)
    return seen


def test_what_layers_read_is_noted_as_long_as_it_is_asked_for():
    model, (x, _) = randomised(Net()), images(5)
    with reading(model) as seen:
        model(x)
        model(x)
    model(x)
    assert tuple(seen) == READ and all(len(calls) == 2 for calls in seen.values())
    assert torch.equal(seen["stem"][0], x) and torch.equal(seen["wide"][1], model.stem(x).relu())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_distance_is_the_mean_over_layers_of_squares_in_the_channels_that_are_left(pruned):
    model, small, plan, (x, _) = pruned
    hints = Hints(model)
    hints.keep(plan.removed())
    ours, theirs = read_by(small, x), read_by(model, x)
    apart = []
    for name, axis in {"wide": 1, "up": 0, "head": 1}.items():
        a, b = ours[name][0], theirs[name][0].detach()
        gone = plan.removed().get((f"{name}.weight", axis), torch.tensor([], dtype=torch.int64)).tolist()
        left = [c for c in range(b.shape[1]) if c not in gone]
        assert gone and a.shape[1] == len(left)
        apart.append((a - b[:, left]).square().mean() / b.square().mean())
    torch.testing.assert_close(hints.distance(ours, theirs), torch.stack(apart).mean())


def test_a_network_that_reads_the_same_is_no_distance_away_and_has_a_gradient_of_zero(pruned):
    model, _, _, (x, _) = pruned
    same, hints = copy.deepcopy(model), Hints(model)
    distance = hints.distance(read_by(same, x), read_by(model, x))
    distance.backward()
    assert distance == 0 and same.stem.weight.grad.eq(0).all()


def test_the_measure_is_that_of_the_first_batch(pruned):
    model, small, plan, (x, _) = pruned
    hints = Hints(model)
    hints.keep(plan.removed())
    first = hints.distance(read_by(small, x), read_by(model, x))
    again = Hints(model)
    again.keep(plan.removed())
    again.distance(read_by(small, x[:1]), read_by(model, x[:1]))
    parts = [again.distance(read_by(small, part), read_by(model, part)) for part in (x[:2], x[2:4])]
    other = again.distance(read_by(small, x[:4]), read_by(model, x[:4]))
    torch.testing.assert_close(torch.stack(parts).mean(), other)  # as it has to be where processes share a batch
    assert first > 0


def test_what_cannot_be_compared_does_not_count_and_is_told(pruned, caplog):
    model, _, _, (x, _) = pruned
    hints, same, theirs = Hints(model), randomised(copy.deepcopy(model), seed=5), read_by(model, x)
    twice = {name: calls * 2 if name == "wide" else calls for name, calls in read_by(same, x).items()}
    without = {name: calls for name, calls in read_by(same, x).items() if name != "wide"}
    with caplog.at_level("INFO", logger="singe"):
        found = hints.distance(twice, theirs)
    assert found == hints.distance(without, theirs) > 0
    assert caplog.messages == ["no hints for stem, wide: nothing trained before, or other inputs"]
    with caplog.at_level("INFO", logger="singe"):
        hints.distance({name: calls for name, calls in without.items() if name != "up"}, theirs)
    assert caplog.messages[1:] == ["no hints for up: nothing trained before, or other inputs"]


def test_where_nothing_can_be_compared_hints_are_refused(pruned):
    model, small, _, (x, _) = pruned
    theirs = read_by(model, x)
    for ours in (read_by(small, x), {"stem": theirs["stem"]}, {}):  # other widths, nothing trained before, none
        with pytest.raises(ValueError, match="got none among stem, wide, up, head; pass hints=0"):
            Hints(model).distance(ours, theirs)
    with pytest.raises(ValueError, match="got none among no layers"):
        Hints(model).distance({}, {})


def test_inputs_by_keyword_and_layers_that_come_later_are_no_trouble():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, late=False):
            x = self.second(self.first(input=x))
            return self.third(x) if late else x

    model, x = Named(), torch.randn(3, 4)
    hints, same = Hints(model), randomised(copy.deepcopy(model), seed=5)
    assert tuple(read_by(model, x)) == ("second",)
    early = hints.distance(read_by(same, x), read_by(model, x))
    with reading(same) as ours, reading(model) as theirs:
        same(x, late=True), model(x, late=True)
    assert hints.distance(ours, theirs) == early > 0


def test_the_gradient_is_that_of_the_loss_and_of_the_distance(pruned):
    model, small, plan, batch = pruned
    step = singe.FineTune(steps=1, lr=1e-3, weight_decay=0, momentum=0, cooldown=0, distill=0, hints=3.0)
    stream = Stream([batch], torch.device("cpu"))
    tuner = Tuner(step, small, stream, Task(), unpruned=model, removed=plan.removed)
    seen, parameters, hints = [], list(small.parameters()), Hints(model)
    tuner.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad for p in parameters))
    hints.keep(plan.removed())
    with reading(small) as ours:
        loss = F.cross_entropy(small(batch[0]), batch[1])
    loss = loss + 3 * hints.distance(ours, read_by(model, batch[0]))
    expected = torch.autograd.grad(loss, parameters)
    tuner.train_stage()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("when", ["after", "layer", "neuron"])
def test_a_run_learns_from_what_is_left_at_every_stage(when):
    model, batch = randomised(Net()).eval(), images(24)
    x, y = batch
    loader = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]

    def apart(hints):
        plan = singe.FineTune(60, lr=0.02, when=when, distill=0, hints=hints)
        found = singe.prune(model, loader, 0.4, criterion="magnitude", finetune=plan, images=24, progress=False)
        measure = Hints(model)
        measure.keep(found.plan.removed())
        return measure.distance(read_by(found.model, x), read_by(model, x)).item()

    assert apart(5.0) < 0.5 * apart(0.0)


def test_masked_networks_and_those_called_in_ones_own_way_learn_likewise():
    model, (x, y) = randomised(Net()).eval(), images(24)
    loader = [{"x": x[i : i + 8], "y": y[i : i + 8]} for i in (0, 8, 16)]

    def apart(hints):
        found = singe.prune(
            model, loader, 0.5, structured=False, criterion="magnitude", images=24, progress=False,
            forward=lambda net, batch: net(batch["x"]), loss=lambda out, batch: F.cross_entropy(out, batch["y"]),
            finetune=singe.FineTune(60, lr=0.02, when="layer", hints=hints),
        )  # fmt: skip
        return Hints(model).distance(read_by(found.model, x), read_by(model, x)).item()

    assert apart(5.0) < 0.5 * apart(0.0)


@pytest.mark.parametrize("hints", [-0.1, float("nan"), float("inf"), "many"])
def test_weights_out_of_range_are_refused(hints):
    with pytest.raises((ValueError, TypeError), match="hints"):
        singe.FineTune(hints=hints)


class Listed(nn.Linear):
    """Reads a list."""

    def forward(self, xs):
        return super().forward(torch.cat(xs, 1))


def test_layers_that_read_something_else_than_numbers_are_left_out():
    model = Wired(lambda m, x: m.c(m.b([m.a(x).relu()]).relu()), a=nn.Linear(4, 6), b=Listed(6, 6), c=nn.Linear(6, 3))
    with reading(model) as reads:
        model(normal(5, 4))
    assert set(reads) == {"a", "c"}


def test_tied_layers_that_are_cut_are_compared_both():
    model = Wired(lambda m, x: m.d(m.c(m.e(m.b(m.a(x).relu()).relu()).relu())), a=nn.Linear(4, 6), b=nn.Linear(6, 5),
                  e=nn.Linear(5, 6), c=nn.Linear(6, 5), d=nn.Linear(5, 3))  # fmt: skip
    model.c.weight = model.b.weight
    hints = Hints(model)
    hints.keep({("b.weight", 1): torch.tensor([1, 2])})
    assert {name: kept.tolist() for name, kept in hints._kept.items()} == {"b": [0, 3, 4, 5], "c": [0, 3, 4, 5]}


def test_experts_that_no_sample_reaches_are_left_out():
    model, x = Experts(), normal(40, 6)
    ours = copy.deepcopy(model)
    with torch.no_grad():
        ours.experts[0][0].weight.mul_(0.9)
    with reading(model) as theirs, reading(ours) as own:
        for network in (model, ours):
            network(x)
    assert len(theirs["experts.2.0"][0]) == 0
    assert 0 < float(Hints(model).distance(own, theirs)) < 1
