import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from networks import images
from torch import nn
from wiring import Wired, normal

import singe
from singe.criteria import resolve

NAMES = {
    "magnitude": singe.Magnitude,
    "gradient": singe.Gradient,
    "magnitude_gradient": singe.MagnitudeGradient,
    "summed_gradient": singe.SummedGradient,
    "integrated_gradient": singe.IntegratedGradient,
    "loss_change": singe.LossChange,
    "random": singe.Random,
    "reconstruction": singe.Reconstruction,
    "feature_relevance": singe.FeatureRelevance,
}
WITHOUT_NORM = (singe.LossChange, singe.Random, singe.Reconstruction, singe.FeatureRelevance)


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_name_stands_for_the_criterion_with_its_defaults(name, kind):
    assert resolve(name) == kind()
    assert resolve(kind()) == kind()


def test_the_defaults_are_p_two_the_neuron_path_and_four_nodes():
    for criterion in (singe.SummedGradient(), singe.IntegratedGradient()):
        assert (criterion.p, criterion.path, criterion.quadrature) == (2, "neuron", singe.GaussLegendre(2))


def test_an_object_is_used_as_it_is():
    mine = singe.IntegratedGradient(p=1, path="layer")
    assert resolve(mine) is mine


def test_integrated_gradient_sums_dt_with_the_norm_and_summed_gradient_log_dt_without():
    quadrature = singe.Geometric(0.8, steps=4)
    for kind, nodes, with_norm in [
        (singe.IntegratedGradient, quadrature.dt(), True),
        (singe.SummedGradient, quadrature.log_dt(), False),
    ]:
        rule = kind(quadrature=quadrature).rule()
        assert rule.with_norm is with_norm
        assert all(torch.equal(a, b) for a, b in zip(rule.nodes, nodes, strict=True))


def test_only_criteria_that_fade_one_neuron_at_a_time_can_score_a_few_for_less():
    for criterion in (singe.SummedGradient(), singe.IntegratedGradient(), singe.LossChange()):
        assert not criterion.scores_together
    layer = singe.IntegratedGradient(path="layer"), singe.SummedGradient(path="layer")
    others = [
        kind() for kind in (singe.Gradient, singe.MagnitudeGradient, *WITHOUT_NORM) if kind is not singe.LossChange
    ]
    for criterion in (*others, *layer):
        assert criterion.scores_together


@pytest.mark.parametrize("kind", [k for k in NAMES.values() if k not in WITHOUT_NORM])
@pytest.mark.parametrize("p", [0, 3, -1, math.nan, "2", None])
def test_an_unknown_order_of_the_norm_is_refused(kind, p):
    with pytest.raises(ValueError, match=r"\bp\b"):
        kind(p=p)


@pytest.mark.parametrize("kind", [singe.SummedGradient, singe.IntegratedGradient])
def test_an_unknown_path_or_a_quadrature_that_is_none_is_refused(kind):
    with pytest.raises(ValueError, match="path"):
        kind(path="network")
    with pytest.raises(TypeError, match="quadrature"):
        kind(quadrature=4)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"integrated_gradient.*'taylor'"):
        resolve("taylor")


@pytest.mark.parametrize("criterion", [None, 2, singe.IntegratedGradient])
def test_what_is_no_criterion_is_refused(criterion):
    with pytest.raises(TypeError, match="criterion"):
        resolve(criterion)


# -- chance ------------------------------------------------------------------------------------------------------


def equals():
    """Three layers of the same width, so that picks can be compared."""
    parts = {name: nn.Linear(10, 10) for name in "abc"}
    wiring = lambda self, x: self.head(self.c(self.b(self.a(x).relu()).relu()).relu())  # noqa: E731
    return Wired(wiring, **parts, head=nn.Linear(10, 4))


def drawn(model, layer, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return singe.score(model, (normal(6, 10), images(6)[1]), layer, criterion="random")


def test_chance_is_drawn_from_the_global_generator_and_hands_it_back():
    model = equals()
    first, other = drawn(model, "b", seed=3), drawn(model, "b", seed=4)
    assert first.shape == (10,) and first.dtype == torch.float64 and ((first >= 0) & (first < 1)).all()
    assert len(first.unique()) == 10 and not torch.equal(first, other)
    assert torch.equal(drawn(model, "b", seed=3), first)
    state = torch.get_rng_state()
    assert torch.equal(drawn(model, "b"), first) and torch.equal(torch.get_rng_state(), state)


def test_chance_prunes_alike_for_one_seed_and_other_neurons_for_another_and_in_every_layer():
    loader = [(normal(16, 10), images(16)[1])]
    options = {"rho": 0.5, "criterion": "random", "finetune": None, "images": 16, "progress": False}
    options |= {"allocation": "uniform"}
    plans = []
    for outer, seed in ((0, 1), (5, 1), (0, 7)):
        torch.manual_seed(outer)
        plans.append(singe.prune(equals(), loader, seed=seed, **options).plan)
    assert plans[0] == plans[1]
    picks = [[removal.neurons for removal in plan.removals] for plan in plans]
    assert all(a != b for a, b in zip(picks[0], picks[2], strict=True))
    assert len({neurons[:2] for neurons in picks[0]}) == 3
    assert any(list(neurons) != sorted(neurons) for neurons in picks[0])


@pytest.mark.parametrize("alpha", [0.5, -1, math.inf, math.nan])
def test_relevance_takes_from_what_inhibits_what_it_gives_to_what_excites(alpha):
    assert singe.FeatureRelevance().alpha == 2
    with pytest.raises(ValueError, match="alpha >= 1"):
        singe.FeatureRelevance(alpha=alpha)


@dataclass(frozen=True)
class Rows(singe.criteria.WeightCriterion):
    """Row by row what a function makes of all of them."""

    function: Callable

    def of_rows(self, rows):
        return self.function(rows)


def test_a_criterion_of_ones_own_sees_the_rows_that_are_left():
    seen = []

    def first_column(rows):
        seen.append(rows.clone())
        return rows[:, 0] + 10

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    result = singe.prune(
        model, data, 0.5, criterion=Rows(first_column), allocation="uniform", finetune=None, progress=False
    )
    (removal,) = result.plan.removals
    assert list(removal.neurons) == model[0].weight[:, 0].argsort()[:3].tolist()
    assert all(rows.dtype == torch.float64 and rows.shape == (6, 3) for rows in seen)
    assert [int((rows == 0).all(1).sum()) for rows in seen[-3:]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("function", "told"),
    [(lambda rows: rows, r"\(6, 3\)"), (lambda rows: rows.sum(), r"\(\)"), (lambda rows: 1, "int")],
)
def test_a_criterion_of_ones_own_gives_a_value_for_each_row(function, told):
    model, batch = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)), (torch.randn(8, 3), torch.arange(8) % 2)
    with pytest.raises(ValueError, match=f"expected a value for each of 6 rows from Rows.of_rows, got {told}"):
        singe.score(model, batch, "0", criterion=Rows(function))


def test_a_criterion_of_ones_own_is_named_alike_in_every_process():
    class Mine(singe.criteria.WeightCriterion):
        def __init__(self, power):
            self.power = power

        def of_rows(self, rows):
            return rows.abs().pow(self.power).sum(1)

    assert repr(Mine(3)) == "Mine(power=3)"
