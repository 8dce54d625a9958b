"""``singe.prune`` by target and allocation: which widths it comes to."""

import itertools
import logging
import math
import sys
from functools import partial

import pytest
import torch
from networks import DigitNet, MobileNet, PlainNet, images, randomised
from pruning import learned, mlp, parameters, prune, snapshot, vectors
from states import same
from torch import nn
from torch.nn import functional as F

import singe
from singe.allocation.cost import mac_cost
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.models.isolation import preserved_random_state
from singe.sizes import count_macs
from singe.training.data import Stream

# -- targets and allocations -------------------------------------------------------------------------------------


def deep(*widths):
    """Linear layers "0", "2", "4", ... with activations between, for ``vectors``."""
    layers = [part for a, b in itertools.pairwise((10, *widths, 4)) for part in (nn.Linear(a, b), nn.ReLU())]
    return randomised(nn.Sequential(*layers[:-1]))


def shares(result):
    """{group: the share of its neurons that is gone} for every group that lost any."""
    return {r.group: len(r.removed) / r.size for r in result.history}


@pytest.mark.parametrize(("make", "rho"), [(PlainNet, 0.35), (MobileNet, 0.5)])
def test_a_share_of_the_multiply_adds_goes_and_no_neuron_more_or_less_comes_closer(make, rho):
    model, (x, y) = randomised(make()), images(8)
    result = prune(model, [(x, y)], rho, target="macs", criterion="magnitude", images=8)
    assert (count_macs(model, x), count_macs(result.model, x)) == (result.macs_before, result.macs_after)
    graph, lost = trace(model, x), {r.group: len(r.removed) for r in result.history}
    groups = [g for g in find_groups(graph) if g.name not in result.frozen]
    cost, removed = mac_cost(model, groups, graph, partial(count_macs, inputs=x)), [lost.get(g.name, 0) for g in groups]
    gap = abs(rho * result.macs_before - cost.gone(removed))
    assert gap / result.macs_before == pytest.approx(abs(result.macs_removed - rho)) and gap < 0.02 * result.macs_before
    for i, group in enumerate(groups):
        for n in {removed[i] - 1, removed[i] + 1} & set(range(group.size)):
            other = [n if i == j else r for j, r in enumerate(removed)]
            assert abs(rho * result.macs_before - cost.gone(other)) >= gap
    assert abs(result.params_removed - rho) > 2 * abs(result.macs_removed - rho)


def test_a_share_of_the_multiply_adds_out_of_reach_says_how_far_it_goes():
    model = mlp()
    reach = 1 - (10 + 1 + 4) / (120 + 108 + 36)
    with pytest.raises(ValueError, match=rf"rho <= {math.floor(reach * 1e4) / 1e4}.*got 0\.95"):
        prune(model, rho=0.95, target="macs", criterion="magnitude")


@pytest.mark.parametrize("allocation", ["uniform", "block", "global", "sensitivity", {"layers.0": 3}])
def test_a_share_of_the_latency_goes_as_measured_before_and_behind(allocation, measured):
    model = mlp()
    result = prune(model, rho=0.5, target="latency", criterion="magnitude", allocation=allocation)
    assert result.latency.before.median == pytest.approx(1e-6 * parameters(model))
    assert result.latency.after.median == pytest.approx(1e-6 * parameters(result.model))
    assert result.latency.removed == pytest.approx(result.params_removed)
    assert 0.5 <= result.latency.removed <= 0.56  # a neuron of the first group is more than two percent
    assert measured[-1] == 2


def test_a_share_of_the_latency_out_of_reach_says_how_far_it_goes(measured):
    with pytest.raises(ValueError, match=r"expected rho <= 0\.\d+, which removes all that can be removed, got 0\.99"):
        prune(mlp(), rho=0.99, target="latency", criterion="magnitude")


def test_latency_is_measured_on_as_many_samples_as_asked_for_and_the_model_is_left_alone(monkeypatch, measured):
    seen, latencies = [], sys.modules["singe.result"].latencies

    def noted(models, example, **options):
        seen.append((len(example), [m.training for m in models]))
        assert models[0] is not model
        return latencies(models, example, **options)

    for name in ("singe.result", "singe.allocation.latency_budget"):
        monkeypatch.setattr(sys.modules[name], "latencies", noted)
    model = mlp().train()
    before = snapshot(model)
    result = prune(model, rho=0.4, target="latency", criterion="magnitude", latency_batch=7)
    assert {size for size, _ in seen} == {7} and result.latency.samples == 7
    assert same(snapshot(model), before) and result.model.training


def test_a_real_clock_will_do():
    wide = nn.Sequential(nn.Linear(10, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 5))
    result = prune(wide, rho=0.01, target="latency", criterion="magnitude", round_to=256)
    assert result.latency.before.median > 0 and result.latency.samples == 1


def test_other_targets_measure_what_came_of_it_alone(measured):
    result = prune(mlp(), criterion="magnitude", latency_batch=3)
    assert measured == [2] and result.latency.samples != 3


def test_linear_takes_larger_shares_from_later_groups():
    result = prune(deep(20, 20, 20, 20), rho=0.4, allocation="linear", criterion="magnitude")
    taken = shares(result)
    assert list(taken) == ["0", "2", "4", "6"]
    assert all(later == pytest.approx((i + 1) * taken["0"], abs=1.5 * (i + 2) / 20)
               for i, later in enumerate(taken.values()))  # fmt: skip
    assert list(taken.values()) == sorted(set(taken.values()))


def test_block_takes_the_same_share_within_a_block_and_more_from_later_ones():
    loader = [images(8, channels=1)]
    taken = shares(prune(randomised(DigitNet(8)), loader, 0.6, allocation="block", criterion="magnitude", images=8))
    stem, first, *rest = taken.values()
    assert list(taken) == ["stem", "blocks.0.conv1", *(f"blocks.{i}.conv{j}" for i in (1, 2) for j in (1, 2))]
    assert 0 < stem < first < min(rest[:2]) and max(rest[:2]) < min(rest[2:])
    assert rest[0] == pytest.approx(rest[1], abs=1 / 16) and rest[2] == pytest.approx(rest[3], abs=1 / 32)


def test_a_mapping_says_how_much_more_or_less_a_layer_loses():
    mapping = {"*": 1, "[246]": 3, "4": 0.5, "6": 0}
    result = prune(deep(40, 40, 40, 40), rho=0.25, allocation=mapping, criterion="magnitude")
    taken = shares(result)
    assert taken == {"0": taken["0"], "2": pytest.approx(3 * taken["0"], abs=0.06),
                     "4": pytest.approx(0.5 * taken["0"], abs=0.06)}  # fmt: skip
    assert result.params_removed == pytest.approx(0.25, abs=0.01)
    assert result.model[6].out_features == 40
    assert result.frozen == {"6": "the allocation gives it no share", "8": "network output"}
    for nothing in ({"*": 0}, {"0": 0, "2": 0.0}):
        with pytest.raises(ValueError, match=r"neurons to prune.*0: the allocation gives it no share"):
            prune(deep(5, 5), allocation=nothing)


def test_a_rate_for_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"allocation, got 'layers\.1\.conv'"):
        prune(mlp(), allocation={"layers.1.conv": 2})


@pytest.mark.parametrize("target", ["params", "macs"])
def test_global_is_the_ranking_of_first_scores_for_what_a_neuron_saves(target):
    model, loader = learned(deep(24, 16, 12), 20), vectors()
    result = prune(model, loader, 0.5, allocation="global", target=target, seed=5)
    with preserved_random_state(loader):
        stream = Stream(loader, torch.device("cpu"))
        stream.restart(5 << 20)
        batch = stream.take(20)  # as for the first group
    bias = target == "params"
    saved = {"0": 10 + 16 + bias, "2": 24 + 12 + bias, "4": 16 + 4 + bias}
    every = sorted((float(s) / unit, name) for name, unit in saved.items() for s in singe.score(model, batch, name))
    lost = [{name: sum(n == name for _, n in every[:k]) for name in saved} for k in range(len(every) + 1)]
    ours = {r.group: len(r.removed) for r in result.history}
    assert any(all(abs(ours.get(n, 0) - counts[n]) <= 1 for n in counts) for counts in lost)
    uniform = prune(model, loader, 0.5, target=target, criterion="magnitude")
    assert {r.group: len(r.removed) for r in uniform.history} not in lost  # the ranking says something
    assert (result.params_removed if bias else result.macs_removed) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("options", [{"target": "params"}, {"target": "macs"}, {"round_to": 3}], ids=str)
def test_no_group_loses_more_than_max_rate(options):
    free, held = (
        prune(deep(24, 20, 7, 16, 8), rho=0.45, allocation={"0": 9}, criterion="random", max_rate=rate, **options)
        for rate in (1, 0.5)
    )
    shares = [[len(r.removed) / r.size for r in result.history] for result in (free, held)]
    assert max(shares[0]) > 0.5 >= max(shares[1])
    with pytest.raises(ValueError, match="expected rho <= "):
        prune(mlp(), rho=0.9, max_rate=0.5)
    with pytest.raises(ValueError, match=r"max_rate=0\.01 leaves it \d+ neurons"):
        prune(mlp(), max_rate=0.01)


def test_no_layer_of_single_weights_loses_more_than_max_rate():
    options = {"structured": False, "allocation": "global", "criterion": "random", "compensate": "none"}
    held = prune(deep(24, 20, 7, 16, 8), rho=0.5, max_rate=0.6, **options)
    assert max(r.removed / r.size for r in held.history) <= 0.6
    assert held.weights_removed == pytest.approx(0.5, abs=1e-2)


def test_round_to_leaves_multiples_in_every_layer_that_loses_any():
    result = prune(deep(24, 20, 7, 16, 8), rho=0.4, round_to=8, criterion="magnitude")
    widths = {r.group: r.size - len(r.removed) for r in result.history}
    assert widths.keys() == {"0", "2", "6"}
    assert set(widths.values()) <= {8, 16}
    assert [m.out_features for m in result.model[::2]] == [widths["0"], widths["2"], 7, widths["6"], 8, 4]
    assert result.frozen == {"4": "has no more than round_to=8 rows", "8": "has no more than round_to=8 rows",
                             "10": "network output"}  # fmt: skip
    with pytest.raises(ValueError, match=r"neurons to prune.*has no more than round_to=32 rows"):
        prune(mlp(), round_to=32)


class Unequal(nn.Module):
    """A neuron is four rows of one layer, by a pixel shuffle, and one of the other."""

    def __init__(self):
        super().__init__()
        self.up, self.side, self.head = nn.Conv2d(3, 48, 3), nn.Conv2d(3, 12, 3), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(F.relu(F.pixel_shuffle(self.up(x), 2)).mean((2, 3)) + self.side(x).mean((2, 3)))


@pytest.mark.parametrize("rho", [0.1, 0.25, 0.5])
def test_round_to_holds_for_every_layer_of_a_group(rho):
    result = prune(randomised(Unequal()), [images(8)], rho, round_to=4, criterion="magnitude", images=8)
    assert [m.out_channels % 4 for m in (result.model.up, result.model.side)] == [0, 0]


@pytest.mark.parametrize(
    "options", [{"target": "macs"}, {"allocation": "global"}, {"round_to": 4, "rho": 0.02}], ids=str
)
def test_a_rho_too_small_for_anything_is_warned_about(options, caplog):
    with caplog.at_level(logging.WARNING, "singe"):
        result = prune(mlp(), **{"rho": 1e-6, "criterion": "magnitude", **options})
    assert result.plan.removals == [] and result.params_after == result.params_before
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["nothing is removed"]


class Untouched:
    """A loader that is not to be read."""

    def __iter__(self):
        pytest.fail("the loader was read")


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"rho": 1.5}, ValueError, r"rho in \(0, 1\), got 1\.5"),
        ({"target": "flops"}, ValueError, "target 'params', 'macs' or 'latency', got 'flops'"),
        ({"target": None}, ValueError, "target 'params', 'macs' or 'latency', got None"),
        ({"allocation": "even"}, ValueError, "got 'even'"),
        ({"allocation": {"layers.0": -1}}, ValueError, r"got -1 for 'layers\.0'"),
        ({"allocation": {"layers.0": math.nan}}, ValueError, r"got nan for 'layers\.0'"),
        ({"allocation": {"layers.0": True}}, TypeError, r"allocation\['layers\.0'\], got bool"),
        ({"allocation": {1: 1}}, TypeError, "module names as keys of allocation, got 1"),
        ({"round_to": 0}, ValueError, "round_to >= 1, got 0"),
        ({"round_to": 8.0}, TypeError, "int for round_to, got float"),
        ({"recalibrate_bn": -1}, ValueError, "recalibrate_bn >= 0, got -1"),
        ({"recalibrate_bn": True}, TypeError, "int for recalibrate_bn, got bool"),
        ({"criterion": "taylor"}, ValueError, "taylor"),
        ({"refresh": "eager"}, ValueError, "eager"),
        ({"finetune": 100}, TypeError, "FineTune"),
        ({"images": 0}, ValueError, "images >= 1, got 0"),
        ({"memory": 0}, ValueError, "memory >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed >= 0, got -1"),
        ({"ignore": "head"}, TypeError, "ignore"),
        ({"loss": "mse"}, TypeError, "loss to be a function, got str"),
        ({"forward": 3}, TypeError, "forward to be a function, got int"),
        ({"model": nn.Linear(2, 2, dtype=torch.complex64)}, ValueError, "complex64"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_the_loader_is_read(options, kind, match):
    options = {"model": mlp(), "loader": Untouched(), **options}
    with pytest.raises(kind, match=match):
        prune(options.pop("model"), options.pop("loader"), **options)
