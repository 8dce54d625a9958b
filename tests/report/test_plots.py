import math

import pytest
from reported import KINDS, group, neurons, rounds, weights

from singe.records import Curve
from singe.report import drawing, plots


@pytest.fixture(autouse=True)
def style():
    with drawing.style():
        yield


def ticks(axes):
    return [text.get_text() for text in axes.get_yticklabels()]


def lengths(axes):
    return [bar.get_width() for bar in axes.patches]


def test_shares_of_what_is_left():
    (axes,) = plots.size(neurons()).axes
    assert ticks(axes) == ["parameters", "multiply-adds", "latency"]
    assert lengths(axes)[3:] == pytest.approx([0.4, 4 / 9, 0.5])
    assert [text.get_text() for text in axes.texts] == ["40.0%", "44.4%", "50.0%"]
    assert ticks(plots.size(weights()).axes[0]) == ["weights", "parameters"]


def test_widths_of_layers_and_shares_of_tensors():
    (axes,) = plots.widths(neurons()).axes
    assert ticks(axes) == ["conv1", "conv2", "head"] and lengths(axes) == [2, 2, 10, 2, 2, 0]
    (axes,) = plots.widths(weights()).axes
    assert ticks(axes) == ["conv.weight", "head.weight"] and lengths(axes)[:2] == pytest.approx([0.6, 0.9])
    assert plots.widths(neurons(widths={})) is None


def test_names_thin_out_where_there_are_too_many():
    (axes,) = plots.widths(neurons(widths={f"layer{i}": (4, 2) for i in range(1000)})).axes
    assert 50 <= len(ticks(axes)) <= plots.TALLEST / plots.ROW
    assert axes.figure.get_size_inches()[1] < plots.TALLEST + 1


def test_losses_and_evaluations_along_the_run():
    evaluation, loss = plots.course(neurons()).axes
    assert list(evaluation.lines[0].get_ydata()) == [0.95, 0.93, 0.9, 0.91]
    assert [list(line.get_ydata()) for line in loss.lines] == [[0.25], [0.9, 0.9], [0.6, 0.6], [0.5]]
    assert [t.get_text() for t in loss.get_xticklabels()] == ["unpruned", "conv1", "conv2", "result"]
    (loss,) = plots.course(weights()).axes
    assert len(loss.lines) == 4
    evaluation, loss = plots.course(rounds()).axes
    assert list(loss.lines[0].get_xdata()) == [21, 42] and list(evaluation.lines[1].get_ydata()) == [0.8, 0.8]
    assert plots.course(neurons(history=())) is None


def test_scores_of_those_that_stay_and_of_those_that_go():
    (axes,) = plots.scores(neurons(history=(group(),))).axes
    stay, go = (c.get_offsets().data.tolist() for c in axes.collections)
    assert stay == [[0.7, 0], [0.05, 0]] and go == [[0.1, 0], [0.15, 0]]  # zero stands left of the least that is not
    assert axes.get_xscale() == "log"
    (axes,) = plots.scores(neurons(history=(group(first_scores=(0.7, -0.15, 0.1, math.nan)),))).axes
    assert axes.get_xscale() == "linear"
    assert ticks(plots.scores(rounds()).axes[0]) == ["epoch 21", "epoch 42"]
    assert plots.scores(weights()) is None


def test_many_scores_are_a_picture():
    many = group(size=5000, first_scores=tuple(range(5000)))
    text = drawing.svg(plots.scores(neurons(history=(many,))), "scores", "")
    assert text.count("<use") < 100 and "data:image/png" in text


def test_curves_of_the_groups_that_have_some():
    history = (group("a"), group("b", curves=()), group("c"), group("d"), group("e"))
    figure = plots.fading(neurons(history=history))
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["a", "c", "d", "e"]
    assert [list(line.get_ydata()) for line in shown[0].lines] == [[0.04, 0.01], [0.06, 0.01]]
    assert shown[0].get_xlim() == (1.03, 0)
    assert plots.fading(rounds()) is None


def test_times_by_length():
    (axes,) = plots.time(neurons()).axes
    assert ticks(axes) == ["fine-tuning", "scoring"] and [t.get_text() for t in axes.texts] == ["2.1 min", "3.0 s"]
    assert plots.time(neurons(seconds={"scoring": 1e-6})) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (0.0123, "12 ms"), (2.345, "2.3 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2.0 h")],
)
def test_durations_in_a_unit_to_read(seconds, text):
    assert plots.duration(seconds) == text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("facts", KINDS.values(), ids=KINDS)
def test_numbers_that_are_not_finite_are_left_out(facts):
    bad = {"loss_end": math.inf, "first_scores": (math.nan,) * 4, "curves": (Curve(0, (0.5, 1), (math.inf, math.nan)),)}
    history = (group(**bad),) if facts is neurons else facts().history
    broken = facts(loss=(math.nan, math.inf), evaluation=(math.nan, 0.5), history=history)
    for draw in (plots.size, plots.widths, plots.course, plots.scores, plots.fading, plots.time):
        if (figure := draw(broken)) is not None:
            assert drawing.png(figure)
