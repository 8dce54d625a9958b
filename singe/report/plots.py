"""The plots of a report; each is None where a result has no data for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeGuard

from ..records import GroupRecord, WeightRecord
from ..timing.stopwatch import duration
from .drawing import GONE, INK, KEPT, PALE, THIRD, every, figure, label
from .facts import Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, TALLEST = 0.19, 14.0
"""Inches of a row of a tall plot, and the most of all its rows together."""

MANY = 4000
"""The number of points above which a plot holds them as a picture, not one by one."""


def size(facts: Facts) -> Figure | None:
    """What is left of parameters, multiply-adds and time, as shares."""
    pairs = {"weights": facts.weights, "parameters": facts.parameters, "multiply-adds": facts.macs}
    rows = [(name, b / a, (b / a, b / a)) for name, pair in pairs.items() if pair is not None for a, b in [pair] if a]
    if facts.latency is not None:
        before, after = facts.latency.before.median, facts.latency.after
        rows.append(("latency", after.median / before, (after.lower / before, after.upper / before)))
    made, (axes,) = figure(0.55 + 0.36 * len(rows))
    whole, left = [1.0] * len(rows), [share for _, share, _ in rows]
    axes.barh(range(len(rows)), whole, color=PALE, alpha=0.45, height=0.62)
    axes.barh(range(len(rows)), left, color=KEPT, height=0.62)
    for row, (_, share, (lower, upper)) in enumerate(rows):
        if lower != upper:
            axes.plot([lower, upper], [row, row], color=INK, linewidth=1.2, marker="|", markersize=7)
        axes.annotate(f"{share:.1%}", (max(1.0, share, upper), row), (6, 0), textcoords="offset points", va="center")
    _rows(axes, [name for name, _, _ in rows])
    axes.set_xlim(0, 1.1 * max(1.0, *left, *(upper for _, _, (_, upper) in rows)))
    axes.set_xlabel("share of what it was before")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return made


def widths(facts: Facts) -> Figure | None:
    """Output channels of every layer, or single weights of every tensor, before and after."""
    if facts.weights is not None:
        pairs = {t.weight: (1.0, 1 - t.removed / t.size) for t in facts.tensors}
        what = "share of the weights"
    else:
        pairs, what = {name: (float(a), float(b)) for name, (a, b) in facts.widths.items()}, "output channels"
    if not pairs:
        return None
    made, (axes,) = figure(0.9 + _height(len(pairs)))
    before, after = zip(*pairs.values(), strict=True)
    axes.barh(range(len(pairs)), after, color=KEPT, height=0.8, label="left")
    axes.barh(
        range(len(pairs)), [b - a for b, a in zip(before, after, strict=True)], left=after, color=GONE, alpha=0.4,
        height=0.8, label="gone",
    )  # fmt: skip
    _rows(axes, list(pairs))
    axes.set_xlabel(what)
    _legend(axes)
    return made


def course(facts: Facts) -> Figure | None:
    """Loss and evaluation along the run."""
    if not facts.history:
        return None
    evaluated = any(value is not None for value in facts.evaluation)
    made, axes = figure(2.5 * (1 + evaluated), 1 + evaluated, sharex=True)
    if facts.rounds:
        _rounds(axes, facts)
    else:
        _steps(axes, facts)
    axes[-1].set_ylabel("loss")
    axes[-1].set_ylim(bottom=min(0.0, axes[-1].get_ylim()[0]))
    _legend(axes[-1])
    if evaluated:
        axes[0].set_ylabel("evaluation")
    return made


def scores(facts: Facts) -> Figure | None:
    """The first scores of each group, removed neurons apart; for rounds, the scores of the neurons they masked."""
    rows = [
        (g.group, [g.first_scores[n] for n in sorted({*range(g.size)} - {*g.removed})],
         [g.first_scores[n] for n in g.removed])
        for g in facts.groups if g.first_scores
    ]  # fmt: skip
    rows += [(f"epoch {r.epoch}", [], [s for own in r.scores.values() for s in own]) for r in facts.rounds]
    rows = [(name, _finite(kept), _finite(gone)) for name, kept, gone in rows]
    values = [value for _, kept, gone in rows for value in (*kept, *gone)]
    if not values:
        return None
    made, (axes,) = figure(0.9 + _height(len(rows)))
    floor = _logarithmic(axes, values)
    for colour, which, text in ((KEPT, 1, "stay"), (GONE, 2, "go")):
        x = [max(floor, value) for own in rows for value in own[which]]
        y = [row for row, own in enumerate(rows) for _ in own[which]]
        if x:
            axes.scatter(
                x, y, marker="|", s=38, linewidths=1.1, alpha=0.8, color=colour, label=text,
                rasterized=len(values) > MANY,
            )  # fmt: skip
    _rows(axes, [name for name, _, _ in rows])
    axes.set_xlabel("score")
    _legend(axes)
    return made


def fading(facts: Facts) -> Figure | None:
    """The gradient's norm along the path of the neurons removed last in some groups."""
    shown = [g for g in facts.groups if g.curves]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    made, axes = figure(0.3 + 2.2 * rows, rows, columns, sharex=True)
    for panel, group in zip(axes, shown, strict=False):
        for curve, colour in zip(group.curves, (THIRD, KEPT, GONE), strict=False):
            _line(panel, curve.t, curve.norms, colour, ".-", f"no. {curve.neuron}")
        panel.set_title(label(group.group, 30), pad=16)
        _gradients(panel, _finite(norm for curve in group.curves for norm in curve.norms))
        panel.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=7, handlelength=1, columnspacing=0.8,
            handletextpad=0.4, borderaxespad=0.1,
        )  # fmt: skip
        panel.set_xlim(1.03, 0)
    for index, panel in enumerate(axes):
        panel.set_visible(index < len(shown))
        if index % columns == 0:
            panel.set_ylabel("gradient's norm")
        if index + columns >= len(shown):
            panel.set_xlabel("t")
            panel.tick_params(labelbottom=True)
    return made


def time(facts: Facts) -> Figure | None:
    """Where the time went, leaving out what took less than a millisecond."""
    spent = sorted(((s, name) for name, s in facts.seconds.items() if s >= 1e-3), reverse=True)
    if not spent:
        return None
    made, (axes,) = figure(0.55 + 0.27 * len(spent))
    axes.barh(range(len(spent)), [s for s, _ in spent], color=KEPT, height=0.62)
    for row, (s, _) in enumerate(spent):
        axes.annotate(duration(s), (s, row), (4, 0), textcoords="offset points", va="center")
    _rows(axes, [name for _, name in spent])
    axes.set_xlim(0, 1.15 * spent[0][0])
    axes.xaxis.set_major_formatter(lambda value, _: duration(value))
    return made


# -- parts of them -----------------------------------------------------------------------------------------------


def _steps(axes: Sequence[Axes], facts: Facts) -> None:
    """Groups or tensors one after the other; 0 is the network before any of them."""
    records: list[GroupRecord | WeightRecord] = [*facts.groups, *facts.tensors]
    names = [*(g.group for g in facts.groups), *(t.weight for t in facts.tensors)]
    x = range(1, len(records) + 1)
    _line(axes[-1], [0], [facts.loss[0]], PALE, "o", "of the unpruned network")
    _line(axes[-1], x, [r.loss_removed for r in records], GONE, "x", "after removal")
    _line(axes[-1], x, [r.loss_end for r in records], KEPT, "o-", "at the end of the step")
    _line(axes[-1], [len(records) + 1], [facts.loss[1]], KEPT, "D", "of the result")
    if len(axes) > 1:
        _evaluated(axes[0], facts, [0, *x, len(records) + 1], [r.evaluation for r in records])
    names = ["unpruned", *(label(name, 24) for name in names), "result"]
    named = every(len(names), 45)
    axes[-1].set_xticks(list(named), [names[i] for i in named], rotation=90)
    for panel in axes:
        panel.grid(visible=False, axis="x")


def _rounds(axes: Sequence[Axes], facts: Facts) -> None:
    """Rounds at their epochs."""
    x = [r.epoch for r in facts.rounds]
    _line(axes[-1], x, [r.loss_start for r in facts.rounds], KEPT, "o", "before the round")
    _line(axes[-1], x, [r.loss_removed for r in facts.rounds], GONE, "o", "after")
    if len(axes) > 1:
        _line(axes[0], x, [r.evaluation_start for r in facts.rounds], KEPT, "o", "before the round")
        _line(axes[0], x, [r.evaluation_removed for r in facts.rounds], GONE, "o", "after")
    axes[-1].set_xlabel("epoch")
    axes[-1].set_xticks([x[i] for i in every(len(x), 30)])


def _evaluated(axes: Axes, facts: Facts, x: Sequence[int], between: Sequence[float | None]) -> None:
    before, after = facts.evaluation
    _line(axes, x, [before, *between, after], KEPT, "o-", "")
    if before is not None:
        axes.axhline(before, color=PALE, linewidth=1, linestyle="--")


def _line(axes: Axes, x: Iterable[float], y: Iterable[float | None], colour: str, look: str, text: str) -> None:
    """With gaps where there is nothing to draw."""
    axes.plot([*x], [value if _is_drawn(value) else math.nan for value in y], look, color=colour, label=text)


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows from top to bottom, with as many names as there is room for."""
    named = every(len(names), int(TALLEST / ROW))
    axes.set_yticks(list(named), [label(names[i]) for i in named])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _height(rows: int) -> float:
    return min(TALLEST, ROW * rows)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handlelength=1.4)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if _is_drawn(value)]


def _is_drawn(value: float | None) -> TypeGuard[float]:
    """Whether there is a number that axes can show."""
    return value is not None and abs(value) < 1e100


def _gradients(axes: Axes, norms: Sequence[float]) -> None:
    """The axis of norms, logarithmic where they differ by much."""
    if norms and 0 < 10 * min(norms) < max(norms):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _logarithmic(axes: Axes, values: Sequence[float]) -> float:
    """Makes the axis of scores logarithmic where none is negative; returns the place of those that are zero."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0:
        return -math.inf
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    return min(positive) / 2 if min(values) == 0 else min(positive)
