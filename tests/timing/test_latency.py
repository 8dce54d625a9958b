import sys
from itertools import count

import pytest
import torch
from torch import nn

import singe
from singe.timing.latency import WARM_UP, Latency, in_turns, latencies, latency

module = sys.modules["singe.timing.latency"]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
X = torch.randn(3, 4)


class Noted(nn.Module):
    """Notes every call: its mode, whether gradients are on, and what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 2), []

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), x.clone()))
        return self.layer(x.mul_(2))


@pytest.fixture
def clock(monkeypatch):
    """A clock that every look at moves on by a second, so that every call takes one."""
    ticks = count()
    monkeypatch.setattr(module, "now", lambda device: next(ticks))


def fake(seconds):
    """Calls that take these seconds, then the last of them for ever."""
    left = list(seconds)
    made = []

    def call():
        made.append(left.pop(0) if len(left) > 1 else left[0])
        return made[-1]

    return call, made


def test_the_median_and_the_quartiles_of_what_the_clock_says(clock):
    assert latency(nn.Linear(4, 2), X, rounds=5) == Latency(1, 1, 1, 5)
    assert Latency.of([5, 1, 2, 4, 3]) == Latency(3, 2, 4, 5)
    assert Latency.of([0.5]) == Latency(0.5, 0.5, 0.5, 1)
    assert str(Latency(0.0123456, 0.012, 0.0131, 9)) == "12.3 ms (12 to 13.1)"


@pytest.mark.parametrize("device", DEVICES)
def test_a_forward_pass_takes_time(device):
    found = latency(nn.Linear(4, 2).to(device), X, rounds=3)  # the example is on the CPU
    assert 0 < found.lower <= found.median <= found.upper and found.rounds == 3


def test_calls_that_still_get_faster_do_not_count():
    call, made = fake([10, 8, 6, 4, 2, 1])
    assert in_turns([call], 4) == [Latency(1, 1, 1, 4)]
    assert made == [10, 8, 6, 4, 2, 1, 1, 1, 1] + [1] * 4  # the last three no better than the best before


def test_noise_does_not_keep_calls_from_settling():
    call, made = fake([2, 1, 3, 1, 2, 5, 1])
    in_turns([call], 1)
    assert len(made) == 5 + 1


def test_warming_up_ends_where_times_never_settle():
    made = []

    def call():
        made.append(0.5 ** len(made))
        return made[-1]

    in_turns([call], 2)
    assert len(made) == WARM_UP + 2


def test_all_models_take_turns_until_the_last_has_settled():
    order = []
    slow, fast = fake([9, 6, 3, 2]), fake([1])
    calls = [lambda i=i, call=call: (order.append(i), call())[1] for i, (call, _) in enumerate((slow, fast))]
    assert in_turns(calls, 5) == [Latency(2, 2, 2, 5), Latency(1, 1, 1, 5)]
    assert order == [0, 1] * (len(order) // 2)
    assert len(slow[1]) == len(fast[1]) == 7 + 5


def test_models_run_in_eval_mode_without_gradients_and_are_left_as_they_were(clock):
    models = Noted().train(), nn.Sequential(Noted(), nn.Dropout()).train()
    models[1][1].eval()
    given, state = X.clone(), torch.get_rng_state()
    assert len(latencies(models, given, rounds=2)) == 2
    assert models[0].training and models[1].training and models[1][0].training and not models[1][1].training
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    calls = models[0].calls + models[1][0].calls
    assert not any(training or grad for training, grad, _ in calls)
    assert torch.equal(given, X) and all(torch.equal(x, X) for *_, x in calls)  # though the model writes into it


@pytest.mark.parametrize("setting", [torch.inference_mode(), torch.device("meta")], ids=["inference", "device"])
def test_the_callers_settings_change_nothing(setting, clock):
    model = nn.Linear(4, 2)
    with setting:
        assert latency(model, X, rounds=2) == Latency(1, 1, 1, 2)


def test_a_failure_leaves_modes_and_random_state_as_they_were():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.calls = nn.Linear(4, 2), 0

        def forward(self, x):
            torch.rand(1)
            self.calls += 1
            if self.calls > 2:
                raise RuntimeError("no more")
            return x

    model, state = Broken(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no more"):
        latency(model, X)
    assert model.training and torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)


def test_a_model_of_any_signature(clock):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, *, ids, mask):
            return self.layer(ids) * mask

    example = {"ids": X, "mask": [torch.ones(3, 1), torch.ones(3, 1)]}
    found = latency(Two(), example, forward=lambda m, b: m(ids=b["ids"], mask=b["mask"][1]), rounds=1)
    assert found.rounds == 1


def test_a_compiled_model_runs_compiled():
    runs = []

    def backend(graph, inputs):
        return lambda *arguments: (runs.append(None), graph.forward(*arguments))[1]

    assert latency(torch.compile(nn.Linear(4, 2), backend=backend), X, rounds=7).rounds == 7
    assert len(runs) > 7


@pytest.mark.parametrize(
    ("models", "example", "options", "error", "message"),
    [
        (nn.Sequential(nn.Linear(4, 2)), X, {}, TypeError, "expected a list of modules, got Sequential"),
        ([nn.Linear(4, 2), "net"], X, {}, TypeError, "expected a module to time, got str"),
        ([], X, {}, ValueError, "at least one model"),
        ([nn.Linear(4, 2)], X, {"rounds": 0}, ValueError, "expected rounds >= 1, got 0"),
        ([nn.Linear(4, 2)], X, {"rounds": 2.0}, TypeError, "expected an int for rounds"),
        ([nn.Linear(4, 2)], [X], {}, TypeError, "expected example to be a tensor x, got list"),
        ([nn.Linear(4, 2)], X[:0], {}, ValueError, "at least 1"),
        ([nn.Linear(4, 2)], X, {"forward": 3}, TypeError, "expected forward to be a function"),
        ([nn.Linear(5, 2)], X, {}, ValueError, r"expected batches that fit Linear, but model\(x\) failed"),
        ([nn.ReLU()], X, {}, ValueError, "on one device, got no parameters"),
    ],
)
def test_bad_input_is_refused(models, example, options, error, message):
    with pytest.raises(error, match=message):
        latencies(models, example, **options)


def test_one_model_that_is_none_is_refused():
    with pytest.raises(TypeError, match="expected a module to time, got int"):
        singe.latency(3, X)
