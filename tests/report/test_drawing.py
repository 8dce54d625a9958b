import sys

import matplotlib
import pytest

from singe.report import drawing


def drawn(title="<a> & $b$"):
    figure, (axes,) = drawing.figure(1.0)
    axes.plot([0, 1], [0, 1], color=drawing.KEPT)
    axes.set_title(title)
    return figure


def test_an_svg_is_one_element_with_names_of_its_own():
    with drawing.style():
        text = drawing.svg(drawn(), "first", "what it shows")
    assert text.startswith("<svg") and text.rstrip().endswith("</svg>")
    assert 'role="img" aria-label="what it shows"' in text and "<metadata" not in text
    assert "&lt;a&gt; &amp; $b$" in text  # no mathematics
    assert 'id="first-figure_1"' in text and "url(#first-" in text
    assert "var(--kept)" in text and drawing.KEPT not in text


def test_a_figure_looks_the_same_twice():
    with drawing.style():
        assert drawing.svg(drawn(), "a", "") == drawing.svg(drawn(), "a", "")


def test_settings_of_matplotlib_are_as_before():
    before = dict(matplotlib.rcParams)
    with pytest.raises(KeyError), drawing.style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
        raise KeyError
    assert dict(matplotlib.rcParams) == before


def test_whatever_the_users_settings_are():
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red"}), drawing.style():
        text = drawing.svg(drawn("plain"), "a", "")
    assert "#ff0000" not in text


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'singe\[plot\]'"), drawing.style():
        pass


def test_names_fit():
    assert drawing.label("layer1.0.conv1") == "layer1.0.conv1"
    long = drawing.label("encoder." * 10 + "last", 20)
    assert len(long) == 20 and long.startswith("encoder.") and long.endswith(".last") and "…" in long
    assert drawing.label("a\x00b\nc\ud800") == "a�b�c�"


def test_labels_where_there_is_room():
    assert [*drawing.every(5, 10)] == [0, 1, 2, 3, 4]
    assert [*drawing.every(25, 10)] == [0, 3, 6, 9, 12, 15, 18, 21, 24]
