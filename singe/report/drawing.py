"""Figures of matplotlib as PNG files, and as SVG that takes its colours from the page around it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, LINE, KEPT, GONE, THIRD, PALE, PAPER = "#1f2430", "#d5d9e0", "#2f6bd8", "#d9591f", "#12907f", "#b4bccb", "#ffffff"
"""Colours of text, grid, what stays, what is removed, another series, the state before, and the background."""

_OF_THE_PAGE = {
    INK: "currentColor", LINE: "var(--line)", KEPT: "var(--kept)", GONE: "var(--gone)", THIRD: "var(--third)",
    PALE: "var(--pale)", PAPER: "var(--paper)",
}  # fmt: skip

WIDTH = 7.6
"""Inches, of every figure."""

_STYLE: dict[str, Any] = {
    "font.size": 9, "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE,
    "axes.titlesize": 9, "axes.labelsize": 9, "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "axes.facecolor": "none", "legend.frameon": False, "legend.fontsize": 8,
    "lines.linewidth": 1.6, "lines.markersize": 4, "figure.constrained_layout.use": True, "svg.fonttype": "none",
    "svg.hashsalt": "singe", "axes.formatter.useoffset": False, "text.parse_math": False,
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """Figures have to be made and saved inside this; matplotlib's settings outside do not change.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context, rcParamsDefault
    except ImportError as error:
        raise ImportError("the report's plots are made with matplotlib: pip install 'singe[plot]'") from error
    settings: dict[Any, Any] = {k: v for k, v in rcParamsDefault.items() if k != "backend"} | _STYLE
    with warnings.catch_warnings(), rc_context(settings):
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        yield


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure, and its axes row by row.

    Args:
        height: in inches.
        rows: of axes.
        columns: likewise.
        options: of ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    made = Figure(figsize=(WIDTH, height))
    return made, list(made.subplots(rows, columns, squeeze=False, **options).flat)


def laid_out(figure: Figure) -> Figure:
    """The figure laid out, once for all files made from it."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def png(figure: Figure) -> bytes:
    """A picture for a light background."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor=PAPER)
    return file.getvalue()


def svg(figure: Figure, name: str, title: str) -> str:
    """An element to be put into a page, where it can be searched and follows the colours.

    Args:
        figure: saved inside :func:`style`.
        name: unique on the page: identifiers begin with it.
        title: for those who cannot see it; plain text without markup.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r' width="[^"]*" height="[^"]*"', f' role="img" aria-label="{title}"', text, count=1)
    for colour, own in _OF_THE_PAGE.items():
        text = text.replace(colour, own)
    return text


def label(name: str, longest: int = 34) -> str:
    """A name that fits beside an axis: without unprintable characters, shortened in the middle."""
    name = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"


def every(count: int, most: int) -> range:
    """The indices that get a label where there is room for ``most``."""
    return range(0, count, max(1, math.ceil(count / most)))
