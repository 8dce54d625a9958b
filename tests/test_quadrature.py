import math

import pytest
import torch

from singe import GaussLegendre, Geometric


def integral(nodes, f):
    t, weight = nodes
    return float((weight * f(t)).sum())


@pytest.mark.parametrize(("mu", "steps"), [(0.95, 90), (0.9, 44), (0.8, 21)])
def test_geometric_stops_at_the_first_step_below_one_percent(mu, steps):
    t, weight = Geometric(mu).dt()
    assert len(t) == steps + 1
    assert t[-2] > 0.01 >= t[-1]
    assert torch.allclose(t, torch.tensor([mu**s for s in range(steps + 1)], dtype=torch.float64))
    assert torch.equal(weight, t)


def test_geometric_takes_no_extra_step_when_the_tolerance_is_an_exact_power():
    for mu, s in [(0.1, 3), (0.5, 7), (0.9, 20), (0.95, 13)]:
        assert len(Geometric(mu, tol=mu**s).dt()[0]) == s + 1


def test_geometric_takes_exactly_the_steps_asked_for():
    t, weight = Geometric(0.9, steps=3).dt()
    assert t.tolist() == pytest.approx([1, 0.9, 0.81, 0.729])
    assert weight.tolist() == t.tolist()
    t, weight = Geometric(0.9, steps=3).log_dt()
    assert t.tolist() == pytest.approx([1, 0.9, 0.81, 0.729])
    assert weight.tolist() == [1] * 4


@pytest.mark.parametrize("mu", [0.95, 0.99, 0.999])
def test_geometric_times_one_minus_mu_converges_to_the_integral_from_above(mu):
    value = (1 - mu) * integral(Geometric(mu, tol=1e-6).dt(), torch.exp)
    assert math.e - 1 < value < (math.e - 1) * (1 + 1.1 * (1 - mu))  # an increasing g: the upper-end sum is larger


@pytest.mark.parametrize("nodes", [1, 2, 4, 7])
def test_gauss_legendre_is_exact_up_to_degree_two_n_minus_one_and_no_further(nodes):
    for degree in range(2 * nodes):
        assert integral(GaussLegendre(nodes).dt(), lambda t, d=degree: t**d) == pytest.approx(1 / (degree + 1), 1e-13)
    beyond = integral(GaussLegendre(nodes).dt(), lambda t: t ** (2 * nodes))
    assert beyond != pytest.approx(1 / (2 * nodes + 1), rel=1e-9)


@pytest.mark.parametrize("tol", [0.1, 0.01])
def test_gauss_legendre_log_dt_integrates_over_ln_t(tol):
    nodes = GaussLegendre(6, tol=tol).log_dt()
    assert integral(nodes, torch.ones_like) == pytest.approx(-math.log(tol))
    assert integral(nodes, torch.log) == pytest.approx(-(math.log(tol) ** 2) / 2)
    assert integral(nodes, lambda t: t) == pytest.approx(1 - tol, rel=1e-6)  # the integral of t dt / t


def test_gauss_legendre_dt_does_not_depend_on_the_tolerance():
    assert torch.equal(GaussLegendre(3, tol=0.3).dt()[0], GaussLegendre(3).dt()[0])


@pytest.mark.parametrize("quadrature", [Geometric(0.8), GaussLegendre(1), GaussLegendre(9), GaussLegendre(3, tol=0.5)])
def test_nodes_lie_on_the_path_never_at_zero_in_float64_and_are_the_callers_own(quadrature):
    for nodes in (quadrature.dt, quadrature.log_dt):
        t, weight = nodes()
        assert t.dtype == weight.dtype == torch.float64
        assert t.shape == weight.shape
        assert ((t > 0) & (t <= 1)).all()
        assert (weight > 0).all()
        t.zero_()
        weight.zero_()
        assert (nodes()[0] > 0).all() and (nodes()[1] > 0).all()


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: Geometric(mu=1), ValueError, "mu"),
        (lambda: Geometric(mu=0.0), ValueError, "mu"),
        (lambda: Geometric(mu=-0.5), ValueError, "mu"),
        (lambda: Geometric(mu=math.nan), ValueError, "mu"),
        (lambda: Geometric(tol=1.0), ValueError, "tol"),
        (lambda: Geometric(steps=0), ValueError, "steps"),
        (lambda: Geometric(steps=2.0), TypeError, "steps"),
        (lambda: Geometric(steps=True), TypeError, "steps"),
        (lambda: GaussLegendre(0), ValueError, "nodes"),
        (lambda: GaussLegendre(-1), ValueError, "nodes"),
        (lambda: GaussLegendre("4"), TypeError, "nodes"),
        (lambda: GaussLegendre(4, tol=0), ValueError, "tol"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, name):
    with pytest.raises(error, match=rf"\b{name}\b"):
        make()
