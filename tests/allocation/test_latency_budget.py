import logging
import sys

import pytest
import torch
from chains import chain
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from singe.allocation.goal import Goal
from singe.allocation.latency_budget import TOLERANCE, TRIES, Machine, counts_within
from singe.sizes import count_parameters
from singe.task import Task
from singe.timing.latency import Latency

module = sys.modules["singe.allocation.latency_budget"]


class Law:
    """A machine on which time follows a law: of each layer its parameters, in steps of so many neurons, and a constant.

    Args:
        widths: of a chain of linear layers.
        step: neurons that are as fast as one.
        constant: what every layer takes beside.
        glue: what the network takes beside its layers, that nothing makes faster.
        noise: by which share the latency of whole networks varies; seeded.
    """

    def __init__(self, widths, step=1, constant=0.0, glue=0.0, noise=0.0):
        self.widths, self.step, self.constant, self.glue, self.noise = widths, step, constant, glue, noise
        self.asked, self.generator = [], torch.Generator().manual_seed(0)

    def layers(self, removed):
        left = [-(-(w - r) // self.step) * self.step for w, r in zip(self.widths, [0, *removed, 0], strict=True)]
        return {str(i): self.constant + left[i + 1] * (left[i] + 1.0) for i in range(len(left) - 1)}

    def latency(self, removed):
        return self.glue + sum(self.layers(removed).values())

    def share(self, removed):
        return 1 - self.latency(removed) / self.latency([0] * len(removed))

    def modules(self, networks):
        return [{**self.layers(removed), "": 1.0} for removed in networks]

    def whole(self, networks):
        self.asked += networks[1:]
        factors = 1 + self.noise * torch.randn(len(networks), generator=self.generator)
        return [self.latency(removed) * factor.item() for removed, factor in zip(networks, factors, strict=True)]


def fitted(law, rho=0.5, scores=None, **options):
    model, groups = chain(law.widths)
    goal = Goal(**{"rho": rho, "target": "latency", "allocation": "uniform", "round_to": 1, "ignore": (), **options})
    return counts_within(goal, model, groups, law, scores)


laws = st.builds(
    Law,
    widths=st.lists(st.integers(16, 200), min_size=3, max_size=7),
    constant=st.floats(0, 1000),
    glue=st.floats(0, 5000),
)


@settings(max_examples=25)
@given(laws, st.floats(0.05, 0.95), st.sampled_from(["uniform", "linear", "block", {"0": 2}]))
def test_whatever_the_law_the_budget_is_met(law, rho, allocation):
    most = [n - 1 for n in law.widths[1:-1]]
    assume(rho < law.share(most) - TOLERANCE)
    counts = fitted(law, rho, allocation=allocation)
    assert law.share(counts) >= rho
    fewer = [[n - (i == j) for j, n in enumerate(counts)] for i in range(len(counts)) if counts[i]]
    smallest = min(law.share(counts) - law.share(other) for other in fewer)
    assert law.share(counts) <= rho + max(TOLERANCE, 2 * smallest)


def test_a_ranking_takes_first_what_saves_the_most_for_its_score():
    law = Law([30, 40, 60, 50, 10], glue=500.0)
    worthless = [torch.full((n,), 1e-6 if n == 60 else 1.0, dtype=torch.float64) for n in (40, 60, 50)]
    counts = fitted(law, 0.3, lambda: worthless, allocation="global")
    assert counts[1] > 20 and counts[0] <= 2 and counts[2] <= 2  # of others a few, to come closer
    assert 0.3 <= law.share(counts) <= 0.3 + TOLERANCE


def test_scores_are_asked_for_once_and_not_for_what_is_out_of_reach():
    asked = []

    def scores():
        asked.append(None)
        return [torch.arange(40.0).double(), torch.arange(60.0).double()]

    law = Law([30, 40, 60, 10], glue=500.0)
    fitted(law, 0.5, scores)
    with pytest.raises(ValueError, match="rho <="):
        fitted(law, 0.999, scores, allocation="global")
    assert not asked
    fitted(law, 0.5, scores, allocation="global")
    assert len(asked) == 1


def test_a_share_that_is_out_of_reach_says_how_far_it_goes():
    law = Law([30, 40, 60, 10], glue=2000.0)
    reach = law.share([39, 59])
    with pytest.raises(ValueError, match=rf"rho <= {int(reach * 1e4) / 1e4}.*, got 0\.9"):
        fitted(law, 0.9)


def test_layers_keep_a_multiple_of_round_to():
    law = Law([64, 96, 128, 64, 10], step=8)
    counts = fitted(law, 0.6, round_to=8)
    assert all((w - n) % 8 == 0 for w, n in zip(law.widths[1:], counts, strict=False))
    assert 0.6 <= law.share(counts) <= 0.65  # a step of one group is some percent


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_what_the_table_gets_wrong_is_corrected_by_what_is_measured_as_a_whole(rho):
    """Modules that seem to take ten times as long when they are looked at one by one."""

    class Misleading(Law):
        def modules(self, networks):
            return [{name: 10 * s**2 for name, s in self.layers(removed).items()} for removed in networks]

    law = Misleading([64, 96, 128, 64, 10], glue=1000.0)
    assert rho <= law.share(fitted(law, rho)) <= rho + TOLERANCE


def test_widths_that_step_over_the_budget_are_rather_too_fast_and_said_to_be(caplog):
    law = Law([64, 64, 64, 64, 10], step=32)  # 64 or 32 neurons, nothing in between
    with caplog.at_level(logging.WARNING, "singe"):
        counts = fitted(law, 0.3)
    assert law.share(counts) > 0.3 + TOLERANCE
    assert "no widths were found that take 0.3 to 0.32 of the latency away" in caplog.text
    assert f"{law.share(counts):.3g}" in caplog.text


def test_noise_ends_after_some_tries_near_the_budget():
    law = Law([64, 96, 128, 64, 10], noise=0.04)
    counts = fitted(law, 0.5)
    assert abs(law.share(counts) - 0.5) < 0.1
    assert len(law.asked) <= 5 + TRIES


@pytest.fixture
def counted(monkeypatch):
    """Networks take as many seconds as they have parameters; what they were called with."""
    calls = []

    def latencies(models, example, forward, rounds):
        calls.append((models, example, forward))
        return [Latency(float(count_parameters(m)), 0.0, 0.0, rounds) for m in models]

    monkeypatch.setattr(module, "latencies", latencies)
    return calls


def test_the_machine_measures_networks_that_really_are_smaller(counted):
    model, groups = chain([5, 8, 6, 3])
    batch = x, _ = torch.randn(2, 5), torch.zeros(2)
    machine = Machine(model.train(), groups, batch, Task())
    assert machine.whole([[0, 0], [3, 2]]) == [5 * 8 + 8 + 8 * 6 + 6 + 6 * 3 + 3, 5 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3]
    [(models, example, forward)] = counted
    assert example is x and forward is None
    assert models[0] is not model and [layer.out_features for layer in model] == [8, 6, 3] and model.training
    assert [layer.out_features for layer in models[1]] == [5, 4, 3] and models[1](x).shape == (2, 3)
    assert [set(found) for found in machine.modules([[0, 0], [3, 2]])] == [{"", "0", "1", "2"}] * 2


def test_the_machine_calls_a_model_as_it_is_to_be_called(counted):
    model, groups = chain([5, 8, 6, 3])
    task = Task(lambda m, batch: m(batch["pixels"]), lambda outputs, batch: outputs.sum())
    machine = Machine(model, groups, {"pixels": torch.randn(2, 5)}, task)
    machine.whole([[0, 0]])
    [(_, example, forward)] = counted
    assert list(example) == ["pixels"] and forward is task.forward
    assert set(machine.modules([[0, 0]])[0]) == {"", "0", "1", "2"}
