import math
from pathlib import Path

import pytest

from singe import values


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)]
)
def test_a_count_must_be_an_int_of_at_least_one(value, error):
    with pytest.raises(error, match=r"\bimages\b"):
        values.integer("images", value, 1)
    assert values.integer("images", 1, 1) == 1 and values.integer("seed", 0, 0) == 0


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (1, ValueError), (math.nan, ValueError), ("0.5", TypeError), (True, TypeError)],
)
def test_a_fraction_is_a_number_between_zero_and_one(value, error):
    with pytest.raises(error, match=r"\brho\b"):
        values.fraction("rho", value)
    assert values.fraction("rho", 0.5) == 0.5


@pytest.mark.parametrize("value", ["c", 1, None, ["a"]])
def test_a_choice_is_one_of_some_names(value):
    values.choice("what", "a", ("a", "b", "d"))
    with pytest.raises(ValueError, match="expected what 'a', 'b' or 'd', got"):
        values.choice("what", value, ("a", "b", "d"))


@pytest.mark.parametrize(("value", "error"), [(3, TypeError), (None, TypeError), (b"a", TypeError), ("", ValueError)])
def test_a_path_is_text_or_path_like_and_taken_literally(value, error):
    with pytest.raises(error, match="expected a path for out, got"):
        values.path("out", value)
    assert str(values.path("out", "~/a")) == "~/a" and values.path("out", Path("a")) == Path("a")
