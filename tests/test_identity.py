import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import singe
from singe.identity import of_function, of_object


def loss(outputs, batch, weight=1.0):
    return weight * outputs.sum()


def test_an_object_without_a_repr_of_its_own_is_the_same_in_every_process():
    class Middle:
        def dt(self):
            return torch.tensor([0.5]).double(), torch.ones(1).double()

        log_dt = dt

    one, other = (singe.IntegratedGradient(quadrature=Middle()) for _ in range(2))
    assert repr(one) != repr(other) and of_object(one) == of_object(other)
    assert of_object(singe.Magnitude(1)) != of_object(singe.Magnitude(2))


PAIRS = {
    "names": (loss, nn.CrossEntropyLoss()),
    "constants of lambdas": (lambda o, b: o.sum() * 2, lambda o, b: o.sum() * 3),
    "calls in lambdas": (lambda o, b: o.sum(), lambda o, b: o.mean()),
    "lambdas in lambdas": (lambda o, b: (lambda v: v + 1)(o), lambda o, b: (lambda v: v + 2)(o)),
    "sets in lambdas": (lambda o, b: o if 1 in {1, 2} else b, lambda o, b: o if 1 in {1, 3} else b),
    "what partials are given": (partial(loss, weight=0.0), partial(loss, weight=0.9)),
    "what partials are given by position": (partial(loss, 1), partial(loss, 2)),
    "tensors in partials": (partial(loss, weight=torch.tensor(1.00001)), partial(loss, weight=torch.tensor(1.00002))),
    "arrays in partials": (partial(loss, weight=np.arange(2000)), partial(loss, weight=np.arange(2000) + 1)),
    "lambdas in partials": (partial(loss, weight=lambda: 1), partial(loss, weight=lambda: 2)),
    "defaults of lambdas": (lambda o, b, w=1: o * w, lambda o, b, w=2: o * w),
    "functions of partials": (partial(loss), partial(lambda o, b: o.sum())),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS.keys())
def test_functions_that_differ_are_told_apart(one, other):
    assert of_function(one) == of_function(one) != of_function(other)


def test_arrays_of_anything_have_an_identity():
    assert of_object(np.array(["a", None], dtype=object)) != of_object(np.array(["b", None], dtype=object))


def test_a_lambda_that_moves_in_its_file_stays_the_same():
    one, other = (eval("\n" * lines + "lambda o, b: o.sum() * 2", {}) for lines in (0, 5))
    assert of_function(one) == of_function(other)


def test_partials_are_the_same_whatever_the_order_of_their_keywords():
    assert of_function(partial(loss, weight=1, batch=2)) == of_function(partial(loss, batch=2, weight=1))


SCRIPT = """
from functools import partial
from singe.identity import of_function, of_object
print(of_function(lambda o, b: o if b in {"a", "b", "c", "d"} else 0), of_object([{"k": {"x", "y", "z"}}]))
"""


def test_sets_are_the_same_in_every_process():
    """The order of a set of strings is another one in each."""
    said = {
        subprocess.check_output([sys.executable, "-c", SCRIPT], env=os.environ | {"PYTHONHASHSEED": str(seed)})
        for seed in range(2)
    }
    assert len(said) == 1
