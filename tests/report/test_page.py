import re
import sys
from html.parser import HTMLParser

import pytest
from reported import KINDS, group, neurons, rounds, weights

import singe
from singe.report import write, write_report
from singe.report.facts import save
from singe.report.page import PLOTS, page

VOID = {"meta", "br", "img", "use", "path", "hr"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and finds elements that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    path = write(KINDS[request.param](), directory)
    assert path == directory / "report.html"
    return request.param, directory, path.read_text(encoding="utf-8")


def test_the_page_stands_alone(written):
    _, _, text = written
    reader = Reader(text)
    assert reader.tags.count("svg") >= 2 and {"script", "link", "iframe", "object"}.isdisjoint(reader.tags)
    for name, value in reader.attributes:
        assert name not in ("src", "srcset", "onclick", "onload", "style") or "url(" not in value
        assert name not in ("href", "xlink:href") or value.startswith("#")
    assert "@import" not in text and re.findall(r"url\((?!#)", text) == []
    assert "default-src 'none'" in text


def test_identifiers_are_those_of_one_element_each(written):
    reader = Reader(written[2])
    names = [value for name, value in reader.attributes if name == "id"]
    assert len(set(names)) == len(names)
    used = {value for name, value in reader.attributes if name == "xlink:href"}
    assert {value[1:] for value in used} | set(re.findall(r"url\(#([^)]*)\)", written[2])) <= set(names)


def test_plots_follow_the_colours_of_the_page(written):
    plots = "".join(re.findall(r"<svg.*?</svg>", written[2], flags=re.DOTALL))
    assert "currentColor" in plots and "var(--kept)" in plots
    assert set(re.findall(r"#[0-9a-f]{6}\b", plots)) <= {"#000000"}


def test_pictures_lie_beside_the_page(written):
    kind, directory, _ = written
    expected = {"neurons": set(PLOTS), "weights": {"size", "widths", "course"}, "rounds": set(PLOTS) - {"fading"}}[kind]
    assert {p.name for p in directory.iterdir()} == {"report.html", *(f"report-{name}.png" for name in expected)}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in directory.glob("*.png"))


def test_what_was_measured_is_on_the_page():
    text = " ".join(Reader(page(neurons(), {"time": "<svg></svg>"})).text.split())
    for said in (
        "60.0% of 1,000 parameters are gone, in 2 groups of neurons.", "9,000 → 4,000", "10 ms → 5 ms",
        "latency of 8 samples", "2.00× as fast", "0.95 → 0.91", "−0.04", "0.25 → 0.5", "network output", "lstm, gru",
        "conv2", "no rule", "2.1 min in all", "IntegratedGradient()",
    ):  # fmt: skip
        assert said in text, said


def test_what_was_not_measured_is_not():
    text = Reader(page(weights(), {})).text
    assert "21.7% of 230 parameters are masked, in 2 weight tensors." in text and "conv.weight" in text
    assert (
        "latency" not in text and "multiply-adds" not in text and "evaluation" not in Reader(page(weights(), {})).tags
    )


def test_a_run_of_one_group_and_one_that_removed_nothing():
    assert "in 1 group of neurons." in page(neurons(history=(group(),)), {})
    assert "in 2 rounds." in page(rounds(), {})
    text = page(neurons(history=(), frozen={}, settings={}, evaluation=(None, None), latency=None), {})
    assert "in 0 groups of neurons." in text and "Nothing." in text


HOSTILE = "<script>alert('x')</script>\"&$x^2$\ud800\x00\n"


def test_names_from_outside_are_text(tmp_path):
    facts = neurons(
        model=HOSTILE, widths={HOSTILE: (4, 2)}, frozen={HOSTILE: HOSTILE}, seconds={HOSTILE: 1.0},
        settings={HOSTILE: HOSTILE, "criterion": HOSTILE}, history=(group(HOSTILE, uncompensated={HOSTILE: HOSTILE}),),
    )  # fmt: skip
    text = write(facts, tmp_path).read_text(encoding="utf-8")
    reader = Reader(text)
    assert "script" not in reader.tags and "<script>alert('x')</script>\"&$x^2$" in reader.text


def test_a_page_is_written_from_what_was_saved(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    save(neurons(), tmp_path)
    path = write_report(str(tmp_path))
    elsewhere = singe.report.write_report(tmp_path, tmp_path / "deep" / "er")
    assert path == tmp_path / "report.html" and elsewhere == tmp_path / "deep" / "er" / "report.html"
    assert path.read_bytes() == elsewhere.read_bytes()


def test_pictures_of_another_result_go(tmp_path):
    write(neurons(), tmp_path)
    (tmp_path / "mine.png").touch()
    write(weights(), tmp_path)
    assert not (tmp_path / "report-fading.png").exists() and (tmp_path / "mine.png").exists()


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'singe\[plot\]'"):
        write(neurons(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
