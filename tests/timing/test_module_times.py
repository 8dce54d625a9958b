import sys

import pytest
import torch
from torch import nn

from singe.task import Task
from singe.timing.module_times import module_times

X = torch.randn(3, 4)


class Clock:
    """A clock that only moves where a module says so."""

    time = 0.0

    def __call__(self, device):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("singe.timing.latency", "singe.timing.module_times"):
        monkeypatch.setattr(sys.modules[module], "now", clock)
    return clock


class Slow(nn.Module):
    """Takes the next of some numbers of seconds before it calls its parts and as long behind them."""

    def __init__(self, clock, *seconds, parts=()):
        super().__init__()
        self.clock, self.seconds, self.calls = clock, seconds, 0
        self.parts, self.weight = nn.ModuleList(parts), nn.Parameter(torch.ones(1))

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        seconds = self.seconds[self.calls % len(self.seconds)] / 2
        self.calls += 1
        self.clock.time += seconds
        for part in self.parts:
            x = part(x)
        self.clock.time += seconds
        return x


def test_every_module_takes_what_it_takes_beside_the_modules_that_it_calls(clock):
    inner = Slow(clock, 4, parts=[Slow(clock, 1), Slow(clock, 2)])
    model = Slow(clock, 8, parts=[inner, Slow(clock, 16), inner]).train()
    model.unused = nn.Linear(1, 1)
    [seconds] = module_times([model], (X, X), Task(), rounds=2)
    assert seconds == {"": 8, "parts.0": 8, "parts.0.parts.0": 2, "parts.0.parts.1": 4, "parts.1": 16}
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_of_several_models_in_turns_the_medians_behind_a_warm_up(clock):
    order = []

    class Noted(Slow):
        def forward(self, x):
            order.append(self)
            return super().forward(x)

    a, b = Noted(clock, 90, 80, 70, 3, 1, 50), Noted(clock, 7)
    assert module_times([a, b], (X, X), Task(), rounds=3) == [{"": 3}, {"": 7}]
    assert order == [a, b] * 6


def test_a_failure_leaves_no_hooks(clock):
    class Broken(Slow):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Slow(clock, 1, parts=[Broken(clock, 1)]).train()
    with pytest.raises(RuntimeError, match="broken"):
        module_times([model], (X, X), Task(), rounds=1)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
