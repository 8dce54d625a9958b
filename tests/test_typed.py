import json
import math
import sys
from dataclasses import dataclass

import pytest

from singe.typed import as_data, reader


@dataclass(frozen=True)
class Point:
    x: float
    name: str = "p"


@dataclass(frozen=True)
class Shape:
    points: tuple[Point, ...]
    sizes: dict[str, tuple[int, int]]
    weight: float | None
    closed: bool = False
    mark: Point | str = "none"


def read(kind, data):
    return reader(kind)(data, "")


SHAPE = Shape((Point(0.5), Point(-2.0, "q")), {"a": (3, 1)}, None, True, Point(1.0))


def test_what_is_written_is_read():
    assert read(Shape, json.loads(json.dumps(as_data(SHAPE), allow_nan=False))) == SHAPE
    assert read(Shape, as_data(Shape((), {}, 1.0))) == Shape((), {}, 1.0)


def test_numbers_that_json_lacks_are_read_as_nan():
    data = as_data(Point(math.inf))
    assert data["x"] is None and math.isnan(read(Point, data).x)


def test_what_is_left_out_has_its_default():
    assert read(Point, {"x": 1}) == Point(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": {}}, "expected list at points"),
        ({"points": [{"name": "p"}]}, r"expected x at points\[0\]"),
        ({"points": [{"x": "1"}]}, r"expected a number at points\[0\]\.x, got '1'"),
        ({"points": [{"x": True}]}, "expected a number"),
        ({"points": [{"x": 10**400}]}, "of 1329 bits"),
        ({"points": [{"x": 1.0, "y": 1.0}]}, r"expected no 'y' at points\[0\]"),
        ({"points": [{"x": 1.0, "name": None}]}, r"expected str at points\[0\]\.name"),
        ({"sizes": {"a": [1]}}, r"expected 2 entries at sizes\['a'\], got 1"),
        ({"sizes": {"a": [1, 2.0]}}, "expected int"),
        ({"sizes": {"a": [1, True]}}, "expected int"),
        ({"sizes": {"a": [1, -1]}}, "expected a non-negative int"),
        ({"sizes": {"a": [1, 2**63]}}, "expected a non-negative int"),
        ({"closed": 1}, "expected bool at closed"),
        ({"mark": 3}, "expected dict at mark, got 3; or expected str at mark, got 3"),
        ({"weight": "heavy"}, "expected a number at weight"),
        ({"colour": "red"}, "expected no 'colour' at the top"),
    ],
)
def test_what_is_of_another_kind_is_refused_where_it_stands(change, message):
    with pytest.raises(ValueError, match=message):
        read(Shape, as_data(SHAPE) | change)


def test_something_else_than_an_object_is_refused():
    with pytest.raises(ValueError, match="expected dict at the top, got \\[\\]"):
        read(Shape, [])


def test_reading_runs_no_code():
    read_shape, events, watching = reader(Shape), [], [True]
    sys.addaudithook(lambda event, _: events.append(event) if watching else None)  # for good
    with pytest.raises(ValueError):
        read_shape(as_data(SHAPE) | {"mark": 3}, "")
    read_shape(as_data(SHAPE), "")
    compile("0", "", "eval")
    watching.clear()
    assert events.count("compile") == 1 and "exec" not in events
