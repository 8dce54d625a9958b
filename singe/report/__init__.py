"""Results for people to read: a page with plots."""

from __future__ import annotations

import os
from pathlib import Path

from . import facts as _facts
from . import page
from .facts import Facts, save

__all__ = ["Facts", "save", "write", "write_report"]


def write_report(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes ``report.html`` and its plots as PNG files, from what ``result.save(directory)`` wrote.

    Args:
        directory: holds ``report.json`` beside a plan or masks.
        out: where the page goes, a directory that is created; ``directory`` itself by default.

    Returns:
        where the page is.

    Raises:
        FileNotFoundError: there is no ``report.json``, as in a directory that an older version saved.
        ImportError: matplotlib is missing.
        ValueError: a file is damaged, of another version, or not of the plan or masks beside it.
    """
    return write(_facts.load(directory), directory if out is None else out)


def write(facts: Facts, directory: str | os.PathLike[str]) -> Path:
    """Writes ``report.html`` and its plots.

    Raises:
        ImportError: matplotlib is missing.
    """
    return page.write(facts, Path(directory))
