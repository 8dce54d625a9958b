"""How long something took."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds spent inside its ``with`` blocks."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
