import copy
import sys
import time
from dataclasses import replace

import pytest
import torch
from networks import MLP, randomised
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe import FineTune, Forecast
from singe.runs.group import Turn
from singe.training.finetune import Tuner

forecast_module = sys.modules["singe.forecast"]


@pytest.fixture(scope="module")
def model():
    return randomised(MLP()).eval()


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 10, generator=generator), torch.randint(4, (48,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(forecast_module, "_CLEAR", 0)


def removed_by(result):
    return [(record.group, record.size, len(record.removed)) for record in result.history]


@pytest.mark.parametrize(
    "arguments",
    [
        {"finetune": None, "compensate": "none", "allocation": "uniform"},
        {"finetune": FineTune(steps=2, hints=1), "criterion": "magnitude", "recalibrate_bn": 64, "round_to": 2},
        {
            "finetune": FineTune(steps=8),
            "evaluate": lambda model: 1.0,
            "compensate": "mean",
            "compensation_images": 32,
            "refresh": "full",
        },
        {"finetune": FineTune(steps=30, when="neuron"), "criterion": "gradient", "target": "macs"},
    ],
)
def test_what_it_says_would_go_is_what_goes(model, loader, arguments):
    arguments |= {"images": 8, "progress": False}
    told, result = singe.forecast(model, loader, 0.3, **arguments), singe.prune(model, loader, 0.3, **arguments)
    assert list(told.parts) == removed_by(result)
    assert told.frozen == result.frozen
    assert told.sizes == {
        "parameters": (result.params_before, result.params_after),
        "multiply-adds": (result.macs_before, result.macs_after),
    }
    takes = {"preparation", "scoring"}
    takes |= {"fine-tuning"} if arguments["finetune"] else set()
    takes |= {"recalibrating"} if "recalibrate_bn" in arguments else set()
    takes |= {"evaluate"} if "evaluate" in arguments else set()
    takes |= {"compensating"} if arguments.get("compensate") != "none" else set()
    assert told.seconds.keys() == takes and all(seconds > 0 for seconds in told.seconds.values())
    assert told.total == pytest.approx(sum(told.seconds.values()))


@pytest.mark.parametrize(("structured", "times"), [(True, 2), (False, 1)])
def test_networks_are_evaluated_once_for_each_width(model, loader, structured, times):
    seen = []
    arguments = {"images": 8, "finetune": None, "progress": False, "structured": structured}
    told = singe.forecast(model, loader, 0.5, **arguments, evaluate=lambda network: float(len(seen.append(1) or seen)))
    assert len(seen) == times and told.seconds["evaluate"] > 0


def test_single_weights_are_told_layer_by_layer(model, loader):
    arguments = {
        "structured": False,
        "images": 8,
        "finetune": FineTune(steps=4),
        "progress": False,
        "recalibrate_bn": 16,
    }
    told, result = singe.forecast(model, loader, 0.5, **arguments), singe.prune(model, loader, 0.5, **arguments)
    assert list(told.parts) == [(record.weight, record.size, record.removed) for record in result.history]
    assert told.sizes == {"weights": (result.weights_before, result.weights_after)}
    assert told.seconds.keys() == {"preparation", "scoring", "fine-tuning", "recalibrating"}


def test_the_model_the_random_state_and_the_checkpoint_stay_as_they_are(model, loader, tmp_path):
    model = copy.deepcopy(model).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    singe.forecast(
        model, loader, 0.3, images=8, finetune=FineTune(steps=4), progress=False, checkpoint=tmp_path / "run"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


def interrupted_after_a_group(*arguments, **options):
    """A run that ends when its first group, or weight tensor, is pruned."""

    def told(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        singe.prune(*arguments, **options, callbacks=[told])


def test_a_run_that_was_interrupted_is_told_the_rest(model, loader, tmp_path, monkeypatch):
    arguments = {"images": 8, "finetune": FineTune(steps=12), "progress": False, "checkpoint": tmp_path}
    whole = singe.forecast(model, loader, 0.3, **arguments)
    interrupted_after_a_group(model, loader, 0.3, **arguments)
    (file,) = tmp_path.iterdir()
    written = file.read_bytes()
    rest = singe.forecast(model, loader, 0.3, **arguments)
    assert rest.parts == whole.parts[1:] and rest.sizes == whole.sizes
    assert file.read_bytes() == written


def test_a_run_that_was_interrupted_while_it_was_tuned_is_told_what_follows_its_groups(
    model, loader, tmp_path, monkeypatch
):
    arguments = {"images": 8, "finetune": FineTune(steps=12), "progress": False, "checkpoint": tmp_path}

    def interrupted(self, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tuner, "train_stage", interrupted)
        singe.prune(model, loader, 0.3, **arguments)
    rest = singe.forecast(model, loader, 0.3, **arguments)
    assert rest.parts == () and rest.seconds.keys() == {"preparation", "fine-tuning", "compensating"}
    assert all(seconds > 0 for seconds in rest.seconds.values())
    singe.prune(model, loader, 0.3, **arguments)
    assert singe.forecast(model, loader, 0.3, **arguments).seconds.keys() == {"preparation"}


@pytest.mark.parametrize("when", ["layer", "after"])
def test_a_run_on_weights_that_was_interrupted_is_told_what_follows(model, loader, tmp_path, monkeypatch, when):
    arguments = {
        "structured": False, "images": 8, "finetune": FineTune(steps=12, when=when), "progress": False,
        "checkpoint": tmp_path / "run",
    }  # fmt: skip
    whole = singe.forecast(model, loader, 0.3, **arguments)
    assert not (tmp_path / "run").exists()
    interrupted_after_a_group(model, loader, 0.3, **arguments)
    rest = singe.forecast(model, loader, 0.3, **arguments)
    assert rest.parts == whole.parts[1:] and rest.sizes == whole.sizes
    singe.prune(model, loader, 0.3, **arguments)
    assert singe.forecast(model, loader, 0.3, **arguments).seconds.keys() == {"preparation"}


def test_bad_arguments_are_refused_as_by_prune(model, loader):
    with pytest.raises(ValueError, match=r"expected rho in \(0, 1\), got 2"):
        singe.forecast(model, loader, 2)
    with pytest.raises(TypeError, match="rounds_to"):
        singe.forecast(model, loader, 0.5, rounds_to=8)


def test_it_prints_what_goes_how_small_it_gets_and_how_long_it_takes():
    told = Forecast(
        parts=(("conv1", 16, 4), ("conv2", 1024, 512)), frozen={"fc": "network output"},
        sizes={"parameters": (2000, 1000), "multiply-adds": (0, 0)},
        seconds={"preparation": 3.0, "scoring": 600.0}, measured=("scoring from 2 of 2 groups",),
    )  # fmt: skip
    assert str(told).splitlines() == [
        "would lose  units  gone  left",
        "----------  -----  ----  ----",
        "conv1          16     4    12",
        "conv2       1,024   512   512",
        "left whole: fc (network output)",
        "",
        "               before  after  change",
        "-------------  ------  -----  ------",
        "parameters      2,000  1,000  -50.0%",
        "multiply-adds       0      0",
        "",
        "would take about 10.1 min: preparation 3.0 s, scoring 10.0 min",
        "  scoring from 2 of 2 groups",
    ]


def test_scores_are_counted_as_selection_counts_them(model, loader):
    for criterion, refresh in [(singe.IntegratedGradient(), "full"), (singe.Magnitude(), "lazy")]:
        result = singe.prune(
            model, loader, 0.3, criterion=criterion, refresh=refresh, images=8, finetune=None, progress=False
        )
        for r in result.history:
            again = (r.neurons_scored - r.size) / len(r.removed)
            assert forecast_module._scores(r.size, len(r.removed), refresh, criterion, again) == r.neurons_scored
    assert forecast_module._scores(10, 3, "lazy", singe.IntegratedGradient(), 2.5) == 17.5
    assert forecast_module._scores(10, 3, "lazy", singe.Gradient(), 9) == 30


def test_samples_are_spread_and_what_lies_between_is_interpolated(monkeypatch):
    assert list(forecast_module._sampled(6, str)) == [5, 0, 4, 2, 1, 3]
    assert list(forecast_module._sampled(1, str)) == [0]
    monkeypatch.setattr(forecast_module, "SAMPLED", -1)
    assert forecast_module._sampled(100, str) == {99: "99", 0: "0"}
    assert forecast_module._interpolated({4: 8.0, 0: 0.0, 2: 0.0}, 5) == [0, 0, 0, 4, 8]


def test_what_evaluations_took_before_is_not_what_one_takes(model, loader, tmp_path, monkeypatch):
    arguments = {"images": 8, "finetune": None, "progress": False, "checkpoint": tmp_path}

    def slow(network):
        time.sleep(0.5)
        return 1.0

    interrupted_after_a_group(model, loader, 0.3, evaluate=slow, **arguments)
    rest = singe.forecast(model, loader, 0.3, evaluate=lambda network: 1.0, **arguments)
    assert 0 < rest.seconds["evaluate"] / (len(rest.parts) + 1) < 0.25


def test_refitting_takes_as_long_as_layers_are_many(loader, monkeypatch):
    class Branching(nn.Module):
        """Three layers read a, one reads b."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(10, 12), nn.Linear(12, 9)
            self.c, self.d, self.e = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(9, 4)

        def forward(self, x):
            x = self.a(x).relu()
            return self.e(self.b(x).relu()) + self.c(x) + self.d(x)

    def a_second_each(self):
        return replace(take(self), seconds_compensating=float(len(self._group.readers)))

    take = Turn.take
    monkeypatch.setattr(Turn, "take", a_second_each)
    monkeypatch.setattr(forecast_module, "TRIED", -1)  # one of the groups
    options = {"compensate": "mean", "finetune": None, "allocation": {"*": 0.3}, "images": 8, "progress": False}
    told = singe.forecast(randomised(Branching()), loader, 0.3, **options)
    assert [part.name for part in told.parts] == ["a", "b"]
    assert told.seconds["compensating"] == pytest.approx(4)
