import random

import numpy as np
import pytest
import torch
from networks import MLP
from torch import nn

from singe.observer import Observer
from singe.records import WeightRecord

RECORD = WeightRecord("w", 4, 1, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_the_network_is_judged_on_a_copy_in_eval_mode_without_gradients():
    model, seen = MLP().train(), []

    def evaluate(network):
        seen.append((network, network.training, torch.is_grad_enabled()))
        network.train()
        with torch.no_grad():
            network.layers[0].weight.zero_()
        return 0.5

    assert Observer(evaluate).evaluation(model) == 0.5
    ((network, training, gradients),) = seen
    assert network is not model and type(network) is MLP and not training and not gradients
    assert model.training and model.layers[0].weight.abs().sum() > 0


def draw(_=None):
    return torch.rand(1).item() + np.random.rand() + random.random()


def test_what_is_drawn_at_random_is_not_drawn_from_the_run():
    observer, model = Observer(draw, [draw]), nn.Linear(1, 1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    observer.evaluation(model)
    observer.tell(RECORD)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_random_states_are_as_before_when_a_callback_fails():
    def fails(record):
        draw()
        raise KeyError(record.weight)

    state = torch.get_rng_state()
    with pytest.raises(KeyError, match="w"):
        Observer(callbacks=[fails]).tell(RECORD)
    assert torch.equal(torch.get_rng_state(), state)


def test_callbacks_are_called_in_order():
    said = []
    observer = Observer(callbacks=(lambda r: said.append((1, r)), lambda r: said.append((2, r))))
    observer.tell(RECORD)
    assert said == [(1, RECORD), (2, RECORD)]


@pytest.mark.parametrize("value", [0.25, 1, torch.tensor(0.25), torch.tensor([[1]]), np.float32(0.25)])
def test_numbers_of_any_kind_are_taken(value):
    result = Observer(lambda _: value).evaluation(nn.Linear(1, 1))
    assert type(result) is float and result == float(value)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (None, TypeError, "number, got NoneType"),
        ("0.5", TypeError, "number, got str"),
        (True, TypeError, "number, got bool"),
        (torch.ones(2), TypeError, "number, got Tensor"),
        (torch.tensor(True), TypeError, "number, got bool"),
        (float("nan"), ValueError, "finite number, got nan"),
        (torch.tensor(float("inf")), ValueError, "finite number, got inf"),
    ],
)
def test_other_answers_are_refused(value, kind, message):
    with pytest.raises(kind, match=message):
        Observer(lambda _: value).evaluation(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5,), "expected evaluate to be a function of a model, got float"),
        ((None, print), "expected a list of functions for callbacks, got builtin_function_or_method"),
        ((None, 3), "expected a list of functions for callbacks, got int"),
        ((None, [print, "log"]), "expected callbacks to be functions of a record, got str"),
    ],
)
def test_what_is_no_function_is_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        Observer(*arguments)


def test_nobody_watching_is_nothing():
    observer = Observer()
    assert observer.evaluation(nn.Linear(1, 1)) is None
    observer.tell(RECORD)


def test_only_the_observer_that_speaks_for_all_ranks_calls_back():
    told = []
    for tells in (True, False):
        Observer(callbacks=[told.append], tells=tells).tell(RECORD)
    assert told == [RECORD]
