from contextlib import redirect_stderr

from terminal import Terminal

from singe import bars
from singe.bars import bar


def test_a_bar_is_shown_on_a_terminal():
    with redirect_stderr(Terminal()) as terminal:
        assert list(bar([1, 2, 3], shown=True, desc="pruning", unit="group")) == [1, 2, 3]
    assert "pruning" in terminal.getvalue() and "3/3" in terminal.getvalue()


def test_none_is_shown_where_it_is_not_wanted():
    with redirect_stderr(Terminal()) as terminal:
        assert list(bar([1, 2], shown=False)) == [1, 2]
    assert terminal.getvalue() == ""


def test_none_is_shown_off_a_terminal(capsys):
    assert list(bar([1, 2], shown=True)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_an_inner_bar_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(bars, "DELAY", 0)
    with redirect_stderr(Terminal()) as terminal, bar(total=1, shown=True, desc="outer") as outer:
        list(bar([1], shown=True, inside=True, desc="inner"))
        outer.update()
    written = terminal.getvalue()
    assert "inner" in written
    assert "\x1b[A" in written.split("inner")[-1]  # back up to the line of the outer one
    assert written.rstrip("\n").rpartition("\r")[2].startswith("outer")


def test_an_inner_bar_of_quick_work_does_not_appear():
    with redirect_stderr(Terminal()) as terminal:
        list(bar([1, 2], shown=True, inside=True, desc="quick"))
    assert "quick" not in terminal.getvalue()
