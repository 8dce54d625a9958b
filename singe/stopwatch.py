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
