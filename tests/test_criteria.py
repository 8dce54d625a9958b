import math

import pytest
import torch

import singe
from singe.criteria import resolve

NAMES = {
    "magnitude": singe.Magnitude,
    "gradient": singe.Gradient,
    "magnitude_gradient": singe.MagnitudeGradient,
    "summed_gradient": singe.SummedGradient,
    "integrated_gradient": singe.IntegratedGradient,
    "loss_change": singe.LossChange,
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_name_stands_for_the_criterion_with_its_defaults(name, kind):
    assert resolve(name) == kind()
    assert resolve(kind()) == kind()


def test_the_defaults_are_p_two_the_neuron_path_and_four_nodes():
    for criterion in (singe.SummedGradient(), singe.IntegratedGradient()):
        assert (criterion.p, criterion.path, criterion.quadrature) == (2, "neuron", singe.GaussLegendre(4))


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
    for criterion in (singe.Gradient(), singe.MagnitudeGradient(), *layer):
        assert criterion.scores_together


@pytest.mark.parametrize("kind", [k for k in NAMES.values() if k is not singe.LossChange])
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
