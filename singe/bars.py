"""Nested progress bars on stderr; none where stderr is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

DELAY = 0.5
"""Seconds after which an inner bar appears: shorter work shows none."""


def bar(items: Iterable[Any] | None = None, *, shown: bool, inside: bool = False, **options: Any) -> tqdm:
    """A bar around an iterable, or one to be updated.

    Args:
        items: what to iterate over, if anything.
        shown: whether to show it at all, on a terminal.
        inside: whether it stands below another bar; it vanishes when it is done.
        options: of ``tqdm``.
    """
    return tqdm(
        items, disable=None if shown else True, leave=not inside, delay=DELAY if inside else 0, dynamic_ncols=True,
        **options,
    )  # fmt: skip
