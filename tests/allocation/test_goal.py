import json
import math
import types

import numpy as np
import pytest
import torch
from chains import chain, group_of
from torch import nn

from singe.allocation.cost import parameter_cost
from singe.allocation.goal import Goal, ignored, left_alone
from singe.graph.groups import Group, Slice


def goal(**options):
    return Goal(**{"rho": 0.4, "target": "params", "allocation": "uniform", "round_to": 1, "ignore": (), **options})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rho": 0}, ValueError, r"rho in \(0, 1\), got 0"),
        ({"rho": 1}, ValueError, r"rho in \(0, 1\), got 1"),
        ({"rho": math.nan}, ValueError, r"rho in \(0, 1\), got nan"),
        ({"rho": "0.5"}, TypeError, "a number for rho, got str"),
        ({"target": "flops"}, ValueError, "'params', 'macs' or 'latency', got 'flops'"),
        ({"target": ["params"]}, ValueError, r"'params', 'macs' or 'latency', got \['params'\]"),
        ({"allocation": "even"}, ValueError, "got 'even'"),
        ({"round_to": 0}, ValueError, "round_to >= 1, got 0"),
        ({"max_rate": 0}, ValueError, r"max_rate in \(0, 1\], got 0"),
        ({"max_rate": 1.5}, ValueError, r"max_rate in \(0, 1\], got 1.5"),
        ({"max_rate": "half"}, TypeError, "max_rate"),
        ({"latency_batch": 0}, ValueError, "latency_batch >= 1, got 0"),
        ({"round_to": True}, TypeError, "int for round_to, got bool"),
        ({"ignore": "a"}, TypeError, "list of module names for ignore, got 'a'"),
        ({"ignore": ["a", None]}, TypeError, r"ignore, got \['a', None\]"),
    ],
    ids=str,
)
def test_a_goal_that_makes_no_sense_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        goal(**options)


def test_what_stays_whole_has_a_reason():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(8)])
    sizes = {"0": 16, "1": 1, "2": 8, "3": 16, "4": 7, "6": 9, "7": 4}
    groups = [group_of(name, size=n) for name, n in sizes.items()]
    last = groups[-1]
    groups[-1] = Group(last.name, last.size, last.writers, last.slices, "network output")
    found = goal(round_to=8, ignore=["3"], allocation={"[06]": 2, "0": 0}).left_whole(model, groups)
    assert found == {
        "7": "network output", "1": "has only one neuron", "3": "ignored", "0": "the allocation gives it no share",
        "2": "has no more than round_to=8 rows", "4": "has no more than round_to=8 rows",
    }  # fmt: skip
    for options in ({"ignore": {"8"}}, {"allocation": {"8": 1}}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}, got '8'"):
            goal(**options).left_whole(model, groups)


def test_what_is_ignored_comes_in_the_order_of_the_network():
    model, groups = chain([3] * 11)
    names = [str(i) for i in range(9)]
    assert list(ignored(model, groups, names[::-1])) == list(ignored(model, groups, set(names))) == names


def test_one_neuron_of_many_channels_says_so():
    coupled = Group("a", 1, ("a.weight",), (Slice("a.weight", 0, torch.zeros(6, dtype=torch.int64), "writes"),), None)
    assert left_alone(nn.Module(), [coupled], ()) == {"a": "its 6 channels can only go together"}


@pytest.mark.parametrize("ranking", ["global", "sensitivity"])
def test_scores_are_asked_for_by_rankings_only_and_not_for_what_is_out_of_reach(ranking):
    model, groups = chain([10, 20, 20, 20, 4])
    asked = []

    def scores():
        asked.append(1)
        return [torch.arange(20.0).double() + 100 * i for i in range(3)]

    def counts(**options):
        return goal(**options).counts(model, groups, None, None, scores, {})

    plain = counts()
    assert not asked and counts(allocation="linear") != plain
    assert counts(allocation={"0": 1, "2": 1}) == plain
    with pytest.raises(ValueError, match="rho <="):
        counts(allocation=ranking, rho=0.99)
    assert not asked
    ranked = counts(allocation=ranking)
    assert asked == [1]
    assert ranked[0] > 10 and ranked[1:] == [0, 0]
    cost = parameter_cost(model, groups)
    assert cost.gone(ranked) / cost.total == pytest.approx(0.4, abs=0.02)


def test_what_keeps_most_is_named_where_rho_is_out_of_reach():
    model, groups = chain([10, 20, 40, 20, 4])
    whole = {"3": "network output", "1": "is computed", "2": "is computed", "0": "ignored", "x": "a", "y": "b"}

    def counts(**options):
        return goal(**options).counts(model, groups[:1], None, None, list, whole)

    kept = r"got 0\.9; most is kept by {}1 and 1 more \(is computed\); 0 \(ignored\); 3 \(network output\)$"
    with pytest.raises(ValueError, match=kept.format("")):
        counts(rho=0.9)
    with pytest.raises(ValueError, match=kept.format(r"max_rate=0\.5 of each; ")):
        counts(rho=0.9, max_rate=0.5)


def test_goals_that_mean_the_same_are_described_alike_in_plain_data():
    given = Goal(np.float32(0.5), "params", {"b": np.float32(2), "a": 1}, 1, {"y", "x"}).described()
    assert given == Goal(0.5, "params", {"b": 2.0, "a": 1}, 1, ["x", "y"]).described()
    assert json.loads(json.dumps(given)) == given


def test_any_collection_and_any_mapping_will_do():
    rates = types.MappingProxyType({"a": 1, "b": np.float32(0.5)})
    found = goal(ignore={"b": 1, "a": 2}.keys(), allocation=rates).described()
    assert found["ignore"] == ["a", "b"] and found["allocation"] == {"a": 1.0, "b": 0.5}
    assert json.loads(json.dumps(found)) == found
