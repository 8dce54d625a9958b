from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singe.allocation.isotonic import Rising

numbers = st.floats(-100, 100, allow_nan=False).map(lambda v: round(v, 3))
points = st.lists(st.tuples(st.integers(0, 12).map(float), numbers), min_size=1, max_size=20)


def test_between_points_it_is_straight_and_beyond_them_level():
    curve = Rising([(2, 10), (0, 0), (1, 2)])
    assert [curve(x) for x in (-1, 0, 0.5, 1, 1.5, 2, 9)] == [0, 0, 1, 2, 6, 10, 10]


def test_what_falls_is_pooled_and_what_was_measured_twice_counts_as_its_mean():
    assert [Rising([(0, 0), (1, 5), (2, 3), (3, 9)])(x) for x in range(4)] == [0, 4, 4, 9]
    assert [Rising([(0, 0), (1, 2), (1, 4), (2, 7)])(x) for x in range(3)] == [0, 3, 7]
    # three measurements pooled with one weigh as much as three
    assert Rising([(0, 4), (0, 5), (0, 6), (1, 1)])(1) == 4


@settings(max_examples=40)
@given(points)
def test_of_all_rising_curves_it_is_the_nearest(measured):
    isotonic = pytest.importorskip("sklearn.isotonic").IsotonicRegression(out_of_bounds="clip")
    x, y = np.array(measured).T
    isotonic.fit(x, y)
    asked, curve = np.linspace(-1, 13, 57), Rising(measured)
    np.testing.assert_allclose([curve(v) for v in asked], isotonic.predict(asked), atol=1e-8)


@settings(max_examples=40)
@given(points)
def test_it_never_falls(measured):
    curve = Rising(measured)
    values = [curve(x / 4) for x in range(-4, 60)]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
