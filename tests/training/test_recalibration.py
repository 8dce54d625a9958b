import logging
from contextlib import contextmanager

import pytest
import torch
from networks import images, randomised
from states import same
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

from singe.task import Task
from singe.training.data import Stream
from singe.training.recalibration import recalibrate


class Net(nn.Module):
    """Batch norms of two ranks with dropout between them, as a module and as a function."""

    def __init__(self, p=0.0):
        super().__init__()
        self.conv1, self.bn1, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=0.3), nn.Dropout(p)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False, momentum=None)
        self.fc, self.bn3, self.head = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 4)
        self.p = p
        randomised(self).double()
        for norm in norms(self).values():
            norm.num_batches_tracked.fill_(70)  # it was trained

    def forward(self, x):
        x = self.drop(self.bn1(self.conv1(x)).relu())
        x = F.dropout(self.bn2(self.conv2(x)).relu().mean((2, 3)), self.p, self.training)
        return self.head(self.bn3(self.fc(x)).relu())


def stream(count=10, batch_size=4):
    x, y = images(count)
    return Stream(DataLoader(TensorDataset(x.double(), y), batch_size=batch_size), torch.device("cpu"))


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def statistics(model):
    return {name: (norm.running_mean.clone(), norm.running_var.clone()) for name, norm in norms(model).items()}


@contextmanager
def watched(model):
    """The inputs of every batch norm, batch by batch."""
    seen = {name: [] for name in norms(model)}
    hooks = [norm.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0]))
             for norm, own in zip(norms(model).values(), seen.values(), strict=True)]  # fmt: skip
    yield seen
    for hook in hooks:
        hook.remove()


def averages(seen):
    """The mean and variance of every channel, averaged over the batches."""

    def average(batches, of):
        return torch.stack([of(x.transpose(0, 1).flatten(1)) for x in batches]).mean(0)

    return {n: (average(b, lambda x: x.mean(1)), average(b, lambda x: x.var(1))) for n, b in seen.items()}


def close(a, b):
    return a.keys() == b.keys() and all(torch.allclose(u, v) for n in a for u, v in zip(a[n], b[n], strict=True))


def test_statistics_become_their_average_over_the_batches():
    model = Net()
    before = statistics(model)
    with watched(model) as seen:
        recalibrate(model, stream(), Task(), 9)
    assert [len(x) for x in seen["bn1"]] == [4, 4, 2]
    assert close(statistics(model), averages(seen))
    assert not close(statistics(model), before)


@pytest.mark.parametrize(("wanted", "batches"), [(1, 1), (4, 1), (5, 2), (8, 2), (10, 3), (11, 4), (23, 7)])
def test_images_are_rounded_up_to_whole_batches(wanted, batches):
    model = Net()
    recalibrate(model, stream(), Task(), wanted)
    assert {int(norm.num_batches_tracked) for norm in norms(model).values()} == {batches}


def test_dropout_does_not_disturb_what_is_seen():
    plain, dropping = Net(0.0), Net(0.9)
    for model in (plain, dropping):
        recalibrate(model, stream(), Task(), 10)
    assert same(statistics(plain), statistics(dropping))


def test_nothing_but_the_statistics_changes():
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    momenta = {name: norm.momentum for name, norm in norms(model).items()}
    with torch.enable_grad():
        recalibrate(model, stream(), Task(), 10)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"bn{i}.{s}" for i in (1, 2, 3) for s in ("running_mean", "running_var", "num_batches_tracked")}
    assert (
        {name: norm.momentum for name, norm in norms(model).items()} == momenta == {"bn1": 0.3, "bn2": None, "bn3": 0.1}
    )
    assert not any(module.training for module in model.modules())
    assert not any(t.requires_grad for t in model.buffers())


def test_modes_and_momenta_are_back_also_after_an_error():
    class Breaking:
        def __iter__(self):
            yield tuple(t.double() if t.is_floating_point() else t for t in images(4))
            raise KeyError("disk")

    model = Net()
    with pytest.raises(KeyError, match="disk"):
        recalibrate(model, Stream(Breaking(), torch.device("cpu")), Task(), 8)
    assert [norm.momentum for norm in norms(model).values()] == [0.3, None, 0.1]
    assert not any(module.training for module in model.modules())


def test_those_that_are_to_stay_still_do_and_the_others_see_what_they_make_of_it():
    model = Net()
    before = statistics(model)
    with watched(model) as seen:
        recalibrate(model, stream(), Task(), 10, still=["bn1"])
    after = statistics(model)
    assert same(after["bn1"], before["bn1"]) and int(model.bn1.num_batches_tracked) == 70
    expected = averages(seen)
    assert all(close({n: after[n]}, {n: expected[n]}) for n in ("bn2", "bn3"))
    normalised = F.relu(model.bn1(seen["bn1"][0]))
    torch.testing.assert_close(seen["bn2"][0], model.conv2(normalised))  # not with the batch's own statistics


@pytest.mark.parametrize("layer", [nn.Identity(), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4)])
def test_a_network_without_running_statistics_is_left_alone_with_a_warning(layer, caplog):
    model = nn.Sequential(nn.Linear(3, 4), layer).eval()
    loader = [(torch.full((2, 3), torch.nan), torch.zeros(2))]  # never drawn from
    with caplog.at_level(logging.WARNING, "singe"):
        recalibrate(model, Stream(loader, torch.device("cpu")), Task(), 8)
    assert "recalibrate_bn changes nothing" in caplog.text
    assert not any(module.training for module in model.modules())


def test_a_last_batch_of_one_sample_does_no_harm():
    model = Net()
    recalibrate(model, stream(9), Task(), 9)
    assert all(t.isfinite().all() for pair in statistics(model).values() for t in pair)
    assert not any(module.training for module in model.modules())


def test_whatever_the_model_is_called_with_will_do():
    model, plain = Net(), Net()
    batches = [{"image": x.double(), "y": y} for x, y in (images(4), images(4, seed=9))]
    forward = Task(forward=lambda network, batch: network(batch["image"]))
    recalibrate(model, Stream(batches, torch.device("cpu"), forward), forward, 8)
    pairs = [(b["image"], b["y"]) for b in batches]
    recalibrate(plain, Stream(pairs, torch.device("cpu")), Task(), 8)
    assert same(statistics(model), statistics(plain))


class Outside(nn.Module):
    """A batch norm called as a function with all its attributes, and one that only training comes by."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.aside = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        randomised(self)

    def forward(self, x):
        n = self.norm
        y = self.conv(x)
        z = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, n.training, n.momentum, n.eps)
        return z.mean((2, 3)) + (self.aside(y).mean((2, 3)) if self.training else 0)


def test_a_norm_that_is_called_as_a_function_is_averaged_and_one_not_come_by_keeps_its_own():
    model = Outside()
    aside = [model.aside.running_mean.clone(), model.aside.running_var.clone()]
    batches = [images(4), images(4, seed=9)]
    recalibrate(model, Stream(batches, torch.device("cpu")), Task(), 8)
    means = torch.stack([model.conv(x).mean((0, 2, 3)) for x, _ in batches]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, means)
    assert model.norm.momentum == 0.1
    assert all(
        torch.equal(a, b) for a, b in zip(aside, (model.aside.running_mean, model.aside.running_var), strict=True)
    )


def test_batches_of_one_sample_alone_are_refused():
    with pytest.raises(ValueError, match="recalibrated on"):
        recalibrate(Net(), stream(3, batch_size=1), Task(), 2)


def test_a_lone_sample_that_some_norms_take_and_others_refuse_leaves_no_trace():
    def recalibrated(sizes):
        net, x = Net(), images(16, size=8)[0].double()
        batches = [(part, torch.zeros(len(part)).long()) for part in x.split(sizes)]
        recalibrate(net.eval(), Stream(batches, torch.device("cpu")), Task(), 15)
        return {name: (norm.running_mean, norm.running_var) for name, norm in norms(net).items()}

    with_lone, x = recalibrated([8, 1, 7]), images(16, size=8)[0]
    without = Net()
    batches = [(part.double(), torch.zeros(len(part)).long()) for part in (x[:8], x[9:])]
    recalibrate(without.eval(), Stream(batches, torch.device("cpu")), Task(), 15)
    for name, norm in norms(without).items():
        for found, expected in zip(with_lone[name], (norm.running_mean, norm.running_var), strict=True):
            assert torch.allclose(found, expected), name
