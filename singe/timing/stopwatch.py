"""How long something took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds spent inside its ``with`` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Adds the seconds spent inside to those of ``what``."""
    watch = Stopwatch()
    try:
        with watch:
            yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + watch.seconds


def duration(seconds: float) -> str:
    """Seconds in a unit to read."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms" if seconds else "0"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"
