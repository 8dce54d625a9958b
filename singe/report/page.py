"""The report as one self-contained HTML page without scripts, light and dark, to read and print."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..records import LatencyChange
from ..storage.files import create_directory, replace
from ..timing.stopwatch import duration
from . import drawing, plots
from .facts import Facts
from .markup import folded, section, table
from .style import CSS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "report.html"

PLOTS: dict[str, tuple[Callable[[Facts], Figure | None], str]] = {
    "size": (plots.size, "What is left of parameters, multiply-adds and latency, as shares"),
    "widths": (plots.widths, "The width of every layer before and after"),
    "course": (plots.course, "Loss and evaluation along the run"),
    "scores": (plots.scores, "The scores of all neurons of each group, removed ones apart"),
    "fading": (plots.fading, "The gradient's norm along the fading path of the neurons removed last"),
    "time": (plots.time, "Where the time went"),
}
"""Name of a plot -> how it is drawn, and what it shows, for those who cannot see it."""


def write(facts: Facts, directory: Path) -> Path:
    """Writes ``report.html`` and ``report-NAME.png`` for every plot into a directory, which is created.

    Raises:
        ImportError: matplotlib is missing.
    """
    with drawing.style():
        drawn = {name: made for name, (draw, _) in PLOTS.items() if (made := draw(facts)) is not None}
        figures = {name: drawing.laid_out(made) for name, made in drawn.items()}
        pictures = {name: drawing.png(made) for name, made in figures.items()}
        inline = {name: drawing.svg(made, name, PLOTS[name][1]) for name, made in figures.items()}
    create_directory(directory)
    for name in PLOTS:
        path = directory / f"report-{name}.png"
        if name in pictures:
            replace(path, lambda part, content=pictures[name]: part.write_bytes(content))  # type: ignore[misc]
        else:
            path.unlink(missing_ok=True)  # of another result
    text = page(facts, inline).encode("utf-8", "replace")
    replace(directory / FILE, lambda part: part.write_bytes(text))
    return directory / FILE


def page(facts: Facts, inline: dict[str, str]) -> str:
    """The whole page.

    Args:
        facts: its contents.
        inline: name of a plot -> its ``<svg>`` element.
    """
    sections = [
        section("What is left", "", inline.get("size", "")),
        _widths(facts, inline.get("widths", "")),
        _course(facts, inline.get("course", "")),
        _scores(facts, inline.get("scores", "")),
        section("Fading curves", _FADING, inline["fading"]) if "fading" in inline else "",
        _frozen(facts),
        _uncompensated(facts),
        _time(facts, inline.get("time", "")),
        _settings(facts),
    ]
    model = escape(facts.model)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{model}, pruned</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<header><p class=kind>singe report</p><h1>{model}</h1>{_summary(facts)}</header>\n{_tiles(facts)}\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


# -- the top -----------------------------------------------------------------------------------------------------


def _summary(facts: Facts) -> str:
    before, after = facts.parameters
    gone = f"{_share(before, after)} of {before:,} parameters are {'masked' if facts.weights else 'gone'}"
    steps = len(facts.history)
    kinds = {"round": facts.rounds, "weight tensor": facts.tensors, "group of neurons": facts.groups}
    one = next((name for name, records in kinds.items() if records), "group of neurons")
    many = one.replace("group", "groups") if one.startswith("group") else f"{one}s"
    return f"<p class=summary>{gone}, in {steps} {one if steps == 1 else many}.</p>"


def _tiles(facts: Facts) -> str:
    tiles = []
    counts = {"single weights": facts.weights, "parameters": facts.parameters, "multiply-adds": facts.macs}
    for name, pair in counts.items():
        if pair is not None:
            tiles.append(_tile(name, f"{pair[0]:,}", f"{pair[1]:,}", _change(*pair)))
    if facts.latency is not None:
        tiles.append(_latency(facts.latency))
    before, after = facts.evaluation
    if before is not None or after is not None:
        difference = "" if before is None or after is None else f"{after - before:+.4g}".replace("-", "−")
        tiles.append(_tile("evaluation", _number(before), _number(after), difference))
    tiles.append(_tile("loss", _number(facts.loss[0]), _number(facts.loss[1]), "on calibration samples"))
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _latency(latency: LatencyChange) -> str:
    name = f"latency of {latency.samples} sample{'s' * (latency.samples != 1)}"
    before, after = latency.before, latency.after
    spread = ", ".join(f"{1e3 * own.lower:.3g} to {1e3 * own.upper:.3g}" for own in (before, after))
    note = f"{before.median / after.median:.2f}× as fast; quartiles {spread} ms"
    return _tile(name, f"{1e3 * before.median:.3g} ms", f"{1e3 * after.median:.3g} ms", note)


def _tile(name: str, before: str, after: str, note: str) -> str:
    return (
        f"<div class=tile><h2>{escape(name)}</h2><p><span class=before>{escape(before)}</span> "
        f"<span class=arrow>→</span> <strong>{escape(after)}</strong></p><p class=note>{escape(note)}</p></div>"
    )


# -- sections ----------------------------------------------------------------------------------------------------

_BEFORE = ["before", "after", "change"]

_FADING = (
    "For the neurons removed last in a few groups: the norm of the loss's gradient while a neuron's weights fade from "
    "their full size (t = 1) to an eighth, measured just before its removal. A criterion that looks only at the "
    "network as it is sees the left end of each line, the integrated gradient all of it: where a line rises, the "
    "neuron matters more than its gradient says."
)


def _widths(facts: Facts, plot: str) -> str:
    if facts.weights is not None:
        rows = [[t.weight, f"{t.size:,}", f"{t.size - t.removed:,}", _change(t.size, t.size - t.removed)]
                for t in facts.tensors]  # fmt: skip
        text = "Single weights of each tensor; masked ones are zero and stay zero while the masks are on."
        return section("Weights, tensor by tensor", text, plot, folded("All tensors", ["tensor", *_BEFORE], rows))
    rows = [[name, f"{a:,}", f"{b:,}", _change(a, b)] for name, (a, b) in facts.widths.items()]
    text = "Output channels of every convolution and linear layer, in the order in which the model lists them."
    return section("Widths", text, plot, folded("All layers", ["layer", *_BEFORE], rows))


def _course(facts: Facts, plot: str) -> str:
    if not facts.history:
        return ""
    if facts.rounds:
        text = "Before and after each round, on samples drawn afresh for it; training goes on between rounds."
        return section("Along the run", text, plot, folded("All rounds", *_rounds(facts)))
    text = (
        "Losses are measured in eval mode on the samples that a step was scored on, drawn afresh each time, so they "
        "scatter."
    )
    if any(value is not None for value in facts.evaluation):
        text += " Evaluation is what <code>evaluate</code> returned after each step, and for the result."
    steps = ("All tensors", *_tensors(facts)) if facts.tensors else ("All groups", *_groups(facts))
    return section("Along the run", text, plot, folded(*steps))


def _groups(facts: Facts) -> tuple[list[str], list[list[str]]]:
    header = [
        "group",
        "neurons",
        "gone",
        "loss before",
        "removed",
        "at the end",
        "evaluation",
        "scoring",
        "fine-tuning",
    ]
    rows = [
        [
            g.group, f"{g.size:,}", f"{len(g.removed):,}", _number(g.loss_start), _number(g.loss_removed),
            _number(g.loss_end), _number(g.evaluation), duration(g.seconds_scoring),
            duration(g.seconds_tuning),
        ]
        for g in facts.groups
    ]  # fmt: skip
    return header, rows


def _tensors(facts: Facts) -> tuple[list[str], list[list[str]]]:
    header = ["tensor", "loss before", "removed", "at the end", "evaluation", "scoring", "fine-tuning"]
    rows = [
        [
            t.weight, _number(t.loss_start), _number(t.loss_removed), _number(t.loss_end), _number(t.evaluation),
            duration(t.seconds_scoring), duration(t.seconds_tuning),
        ]
        for t in facts.tensors
    ]  # fmt: skip
    return header, rows


def _rounds(facts: Facts) -> tuple[list[str], list[list[str]]]:
    header = ["epoch", "channels", "loss before", "after", "evaluation before", "after", "time"]
    rows = [
        [
            f"{r.epoch}", f"{r.channels:,}", _number(r.loss_start), _number(r.loss_removed),
            _number(r.evaluation_start), _number(r.evaluation_removed), duration(r.seconds),
        ]
        for r in facts.rounds
    ]  # fmt: skip
    return header, rows


def _scores(facts: Facts, plot: str) -> str:
    criterion = escape(facts.settings.get("criterion", "the criterion"))
    text = (
        f"The scores by <code>{criterion}</code> of every neuron of a group before the first removal. Scores are "
        "computed again as neurons are removed, so those removed need not be the leftmost here."
    )
    if facts.rounds:
        text = (
            f"The scores by <code>{criterion}</code> of the neurons masked in a round, divided by the norm of their "
            "group's scores."
        )
    return section("Scores", text, plot)


def _frozen(facts: Facts) -> str:
    if not facts.frozen:
        return section("Left whole", "", "<p>Nothing.</p>")
    names: dict[str, list[str]] = {}
    for name, reason in facts.frozen.items():
        names.setdefault(reason, []).append(name)
    rows = [[reason, ", ".join(own)] for reason, own in names.items()]
    return section("Left whole", "Groups that lost nothing, and why.", table(["reason", "where"], rows, numbers=False))


def _uncompensated(facts: Facts) -> str:
    rows = [[f"after {g.group}", name, reason] for g in facts.groups for name, reason in g.uncompensated.items()]
    rows += [["at the end", name, reason] for name, reason in facts.uncompensated.items()]
    text = "Layers that could not be refitted after a group was pruned, or when all layers were, and why."
    return section("Not refitted", text, table(["when", "layer", "reason"], rows, numbers=False)) if rows else ""


def _time(facts: Facts, plot: str) -> str:
    total = sum(facts.seconds.values())
    return section("Where the time went", f"{duration(total)} in all, as far as it was measured.", plot)


def _settings(facts: Facts) -> str:
    rows = [[name, value] for name, value in facts.settings.items()]
    return section("Settings", "", table(["setting", "value"], rows, numbers=False)) if rows else ""


# -- numbers -----------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _share(before: int, after: int) -> str:
    return f"{1 - after / before:.1%}"


def _change(before: int, after: int) -> str:
    return f"−{_share(before, after)}" if after < before else "0"
