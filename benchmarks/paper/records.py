"""Finished runs, so that none is ever repeated: a line of JSON each, found again by its settings."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Record = dict[str, Any]


class Records:
    """A file of JSON lines, one a run, each with the "settings" it was made with.

    Several processes may add runs at a time. A line that a kill cut off is not a run.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> list[Record]:
        """All runs, in the order they were done."""
        if not self._path.exists():
            return []
        whole = self._path.read_text().rpartition("\n")[0]
        return [record for line in whole.split("\n") if (record := _parsed(line)) is not None]

    def find(self, settings: Settings) -> Record | None:
        """The latest run with exactly these settings."""
        return next((r for r in reversed(self.all()) if r["settings"] == settings), None)

    @contextmanager
    def unfinished(self, settings: Settings) -> Iterator[Path | None]:
        """A directory beside the file for what a run can continue from if it is killed; gone when it is done.

        None where another process works on the same.

        Args:
            settings: of the run, and all else that has to be the same for it to continue.
        """
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        directory = self._path.with_suffix(".unfinished") / name
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield None
                return
            yield directory
            shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # others may be left
            directory.parent.rmdir()

    def add(self, settings: Settings, found: Record) -> Record:
        """Keeps a run."""
        record = {"settings": settings, **found}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record) + "\n"
        with self._path.open("a+b") as file:  # a line that a kill cut off stays a line of its own
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"\n", b"")
            file.write(("\n" if torn else "").encode() + line.encode())
        return record


def _parsed(line: str) -> Record | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
