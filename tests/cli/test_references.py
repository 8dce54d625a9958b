import sys

import pytest

from singe.cli.references import find


def test_a_module_in_the_current_directory_is_found(place):
    assert find("nets:tiny") is sys.modules["nets"].tiny
    assert find("nets:Tiny.forward") is sys.modules["nets"].Tiny.forward


def test_a_module_in_a_package_is_found(place):
    (place / "package").mkdir()
    (place / "package" / "inner.py").write_text("value = 3")
    assert find("package.inner:value") == 3


@pytest.mark.parametrize("call", ["nets:Tiny(7)", "nets:Tiny(width=7)", "nets:Tiny( width = 7, )"])
def test_brackets_call_with_literals(place, call):
    assert find(call).layers[0].out_channels == 7


def test_empty_brackets_call_without(place):
    assert find("nets:Tiny()").layers[0].out_channels == 4


@pytest.mark.parametrize(
    "reference, message",
    [
        ("nets", "expected package.module:name"),
        ("nets:", "expected package.module:name"),
        ("nets:tiny:x", "expected package.module:name"),
        ("nets.py:tiny", "cannot import nets.py"),
        ("no/nets:tiny", "expected package.module:name"),
        ("nowhere:tiny", "cannot import nowhere.*No module named"),
        ("nets:large", "expected 'large' in nets.*found none"),
        ("nets:Tiny(", "expected literals"),
        ("nets:Tiny(open('x'))", "expected literals"),
        ("nets:Tiny(**{})", "expected literals"),
        ("nets:Tiny(3)(4)", "expected literals"),
        ("nets:Tiny(depth=3)", r"failed: TypeError.*depth"),
        ("nets:broken()", "failed: RuntimeError: no such"),
    ],
)
def test_what_is_no_reference_is_refused(place, reference, message):
    with pytest.raises(ValueError, match=message):
        find(reference)


def test_a_module_that_raises_is_refused_by_name(place):
    (place / "bad.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="cannot import bad of 'bad:x': ZeroDivisionError"):
        find("bad:x")
