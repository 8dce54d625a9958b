"""``singe.prune`` with somebody who looks on."""

import math
import random

import numpy as np
import pytest
import torch
from pruning import mlp, parameters, prune, random_states, same_plan, snapshot, vectors
from states import same

from singe import FineTune
from singe.runs.neurons import NeuronRun
from singe.runs.weights import WeightRun
from singe.scoring.curves import POINTS

# -- who watches a run -------------------------------------------------------------------------------------------


class Watched:
    """An MLP pruned twice alike, once with somebody who watches and draws at random."""

    def __init__(self):
        self.told, self.judged = [], []
        options = {"finetune": FineTune(steps=6), "seed": 5}
        self.plain = prune(mlp(), **options)
        self.result = prune(mlp(), **options, evaluate=self.evaluate, callbacks=[self.told.append, self.draw])

    def evaluate(self, model):
        self.draw()
        self.judged.append(parameters(model))
        return float(len(self.judged))

    def draw(self, record=None):
        torch.rand(3), np.random.rand(), random.random()


@pytest.fixture(scope="module")
def watched():
    return Watched()


def test_nothing_moves_because_somebody_watches(watched):
    assert same_plan(watched.result, watched.plain)
    assert same(watched.result.model.state_dict(), watched.plain.model.state_dict())
    assert (
        watched.plain.evaluation_before is watched.plain.evaluation_after is watched.plain.history[0].evaluation is None
    )


def test_the_network_is_evaluated_before_between_and_behind(watched):
    result = watched.result
    evaluations = [result.evaluation_before, *(r.evaluation for r in result.history), result.evaluation_after]
    assert evaluations == list(range(1, len(result.history) + 3))
    assert watched.judged[0] == result.params_before and watched.judged[-2:] == [result.params_after] * 2
    assert watched.judged == sorted(watched.judged, reverse=True)


def test_every_record_is_handed_over(watched):
    assert len(watched.told) == 2 and all(a is b for a, b in zip(watched.told, watched.result.history, strict=True))


def test_a_run_says_what_decided_it_and_what_took_its_time(watched):
    settings, seconds = watched.result.settings, watched.result.seconds
    assert settings["rho"] == "0.3" and settings["seed"] == "5" and settings["loss"] == "cross_entropy"
    assert settings["torch"] == torch.__version__ and "evaluate" not in settings
    assert {"analysis", "scoring", "fine-tuning", "evaluate", "latency", "fading curves"} <= seconds.keys()
    assert all(s > 0 for s in seconds.values())


def test_widths_and_latency_are_those_of_both_networks(watched):
    result = watched.result
    sizes = {r.group: (r.size, r.size - len(r.neurons)) for r in result.plan.removals}
    assert result.widths == {**sizes, "layers.4": (4, 4)}
    assert result.latency.samples == 8 and result.latency.before.rounds == result.latency.after.rounds
    assert result.latency.before.median > 0


def test_first_scores_are_those_of_the_whole_group(watched):
    for record in watched.result.history:
        assert len(record.first_scores) == record.size
        assert record.scores[0] == min(record.first_scores) == record.first_scores[record.removed[0]]


def test_fading_curves_are_recorded_and_change_nothing(watched, monkeypatch):
    for record in watched.result.history:
        assert [curve.neuron for curve in record.curves] == list(record.removed[-3:])
        assert all(curve.t == POINTS and len(curve.norms) == len(POINTS) for curve in record.curves)
    monkeypatch.setattr("singe.scoring.curves.recorded", lambda *_: False)
    without = prune(mlp(), finetune=FineTune(steps=6), seed=5)
    assert not any(record.curves for record in without.history) and same_plan(without, watched.result)
    assert [r.scores for r in without.history] == [r.scores for r in watched.result.history]
    assert same(without.model.state_dict(), watched.result.model.state_dict())


def test_a_callback_that_fails_ends_the_run_and_leaves_everything_as_it_was():
    class Enough(Exception):
        pass

    def stop(record):
        torch.rand(1)
        raise Enough(record.group)

    model, generator = mlp().train(), torch.Generator().manual_seed(3)
    before = snapshot(model), random_states(generator)
    with pytest.raises(Enough, match=r"layers\.0"):
        prune(model, vectors(generator=generator), callbacks=[stop])
    assert same((snapshot(model), random_states(generator)), before)


def frozen_mlp():
    return mlp().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "arguments", "expected"),
    [
        (mlp, {"evaluate": lambda model: "good"}, "expected evaluate.* to return a number, got str"),
        (mlp, {"evaluate": lambda model: math.inf}, "expected evaluate.* to return a finite number, got inf"),
        (frozen_mlp, {"finetune": FineTune()}, "expected a parameter that requires a gradient to fine-tune"),
        (
            mlp,
            {
                "finetune": FineTune(distill=0.5),
                "forward": lambda model, batch: model(batch[0]).flatten(),
                "loss": lambda outputs, batch: outputs.square().mean(),
            },
            r"expected logits \[B, classes",
        ),
    ],
)
@pytest.mark.parametrize("structured", [True, False])
def test_what_would_fail_at_the_end_is_refused_before_anything_is_ranked(
    monkeypatch, structured, make, arguments, expected
):
    monkeypatch.setattr(NeuronRun, "plan_widths", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr(WeightRun, "plan_shares", lambda *_: pytest.fail("work has begun"))
    with pytest.raises((TypeError, ValueError), match=expected):
        prune(make(), structured=structured, **arguments)


def test_a_network_that_cannot_be_evaluated_is_not_pruned():
    told = []
    with pytest.raises(TypeError, match=r"expected evaluate\(model\) to return a number, got NoneType"):
        prune(mlp(), evaluate=lambda model: None, callbacks=[told.append])
    with pytest.raises(ValueError, match="finite number, got nan"):
        prune(mlp(), evaluate=lambda model: math.nan, callbacks=[told.append])
    assert not told


def test_what_cannot_watch_is_refused():
    with pytest.raises(TypeError, match="expected evaluate to be a function"):
        prune(mlp(), evaluate=0.9)
    with pytest.raises(TypeError, match="expected callbacks to be functions"):
        prune(mlp(), callbacks=["log"])


def test_a_network_whose_result_could_not_be_saved_is_told_before_the_run(caplog):
    class Stateful(type(mlp())):
        def get_extra_state(self):
            return {"version": 1}

        def set_extra_state(self, state):
            pass

    prune(Stateful())
    assert "the result cannot be saved with result.save: expected a model whose state is tensors only" in caplog.text
