import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wiring import normal

from singe.refit.regression import RIDGE, Moments, Regressions, Samples, regression


def solved(x, y, offset):
    return regression(x, y, y[:, :0]).solve(offset)


def ridge_by_autograd(x, y, offset):
    """The same minimum, found by one Newton step of the function as it is written."""
    means = [t.mean(0) if offset else torch.zeros_like(t[0]) for t in (x, y)]
    cost = RIDGE * (x - means[0]).square().sum() / x.shape[1]

    def function(flat):
        constant = flat[-1] if offset else 0
        change = flat[: x.shape[1]]
        return (x @ change + constant - y[:, 0]).square().sum() + cost * change.square().sum()

    start = torch.zeros(x.shape[1] + offset, dtype=x.dtype)
    gradient = torch.autograd.functional.jacobian(function, start)
    hessian = torch.autograd.functional.hessian(function, start)
    return -torch.linalg.solve(hessian, gradient)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("rows", "features"), [(40, 5), (6, 12)])
def test_least_squares_finds_the_minimum(rows, features, offset):
    x, y = normal(rows, features, dtype=torch.float64) + 1, normal(rows, 1, seed=4, dtype=torch.float64)
    change, constant = solved(x, y, offset)
    expected = ridge_by_autograd(x, y, offset)
    assert torch.allclose(change[0], expected[:features], rtol=1e-7, atol=1e-9)
    assert torch.allclose(constant[0], expected[-1] if offset else torch.zeros((), dtype=x.dtype), atol=1e-8)


def test_nothing_is_learnt_from_inputs_that_are_zero():
    change, constant = solved(torch.zeros(5, 3), normal(5, 2), True)
    assert not change.any() and torch.allclose(constant.float(), normal(5, 2).mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.7])
def test_nothing_is_learnt_from_the_rounding_of_a_constant(value, dtype):
    noise = torch.finfo(dtype).eps * torch.randint(-1, 2, (1000, 3), generator=torch.Generator().manual_seed(0))
    for x in (torch.full((1000, 3), value, dtype=dtype), value * (1 + noise).to(dtype)):
        change, constant = solved(x, normal(1000, 2, dtype=dtype), True)
        assert not change.any() and constant.shape == (2,)


@pytest.mark.parametrize(("rows", "kind"), [(40, Moments), (6, Samples)])
def test_few_equations_are_kept_and_many_summed_up(rows, kind):
    assert isinstance(regression(normal(rows, 12), normal(rows, 3), normal(rows, 3)), kind)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(2, 40),
    offset=st.booleans(),
    gone=st.lists(st.integers(0, 7), unique=True),
    then=st.lists(st.integers(0, 7), unique=True),
    seed=st.integers(0, 99),
)
def test_without_inputs_is_as_if_they_had_never_been(rows, offset, gone, then, seed):
    x, y, z, weight = (normal(*shape, seed=seed + i, dtype=torch.float64) + 1 for i, shape in enumerate(
        [(rows, 8), (rows, 3), (rows, 3), (3, 8)]
    ))  # fmt: skip
    less = regression(x, y, z)
    for columns in (torch.tensor(gone, dtype=torch.int64), torch.tensor(then, dtype=torch.int64)):
        less = less.without(columns, weight[:, columns])
        lost = x[:, columns] @ weight[:, columns].T
        x, y, z = x.index_fill(1, columns, 0), y + lost, z - lost
    change, constant = less.solve(offset)
    expected, expected_constant = regression(x, y, z).solve(offset)
    torch.testing.assert_close(change, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(constant, expected_constant, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(less.mean_y, y.mean(0))
    if isinstance(less, Moments):
        after = z + x @ change.T + constant
        mean, variance = less.outputs(change, constant)
        torch.testing.assert_close(mean, after.mean(0), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(variance, after.var(0, correction=0), rtol=1e-6, atol=1e-8)


def test_groups_of_a_convolution_are_solved_by_themselves():
    x, y, z, kernel = (normal(*shape, dtype=torch.float64) for shape in [(90, 6, 4), (90, 4), (90, 4), (4, 3, 4)])
    parts = list(zip(*(t.chunk(2, 1) for t in (x, y, z)), strict=True))
    both = Regressions([regression(own.flatten(1), *rest) for own, *rest in parts])
    columns = torch.tensor([0, 2])
    change, constant = both.without(kernel, columns).solve(True)
    mean, variance = both.outputs(torch.zeros(4, 12), torch.zeros(4))
    for part, (own, missing, output) in enumerate(parts):
        rows = slice(2 * part, 2 * part + 2)
        lost = torch.einsum("nkt,mkt->nm", own[:, columns], kernel[rows, columns])
        expected = solved(own.index_fill(1, columns, 0).flatten(1), missing + lost, True)
        torch.testing.assert_close(change[rows], expected[0])
        torch.testing.assert_close(constant[rows], expected[1])
        torch.testing.assert_close(mean[rows], output.mean(0))
        torch.testing.assert_close(variance[rows], output.var(0, correction=0))
