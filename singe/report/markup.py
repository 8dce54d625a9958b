"""Pieces of an HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def section(title: str, text: str, *content: str) -> str:
    """A section, or nothing if it has no content.

    Args:
        title: HTML, as are the others.
        text: before the content; may be empty.
        content: ``<svg>`` elements and others, of which some may be empty.
    """
    told = f"<p>{text}</p>" if text else ""
    body = "".join(f"<figure>{own}</figure>" if own.startswith("<svg") else own for own in content)
    return f"<section><h2>{title}</h2>{told}{body}</section>" if body else ""


def folded(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that is unfolded on request, and in print; nothing if it has no rows."""
    return f"<details><summary>{title}</summary>{table(header, rows)}</details>" if rows else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    """A table of texts, which are escaped; of numbers except in the first column, or of words."""
    head = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    look = "numbers" if numbers else "words"
    return f"<div class=scroll><table class={look}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
