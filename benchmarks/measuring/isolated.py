"""A script in a separate process, which may crash or hang without losing what it printed before."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from typing import Any


def findings(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """What a script printed, a JSON object a line, as one object; and "stopped", why it did not finish.

    Args:
        command: of the script.
        seconds: that it may take.
    """
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds)
        said, stopped = done.stdout, _end(done.returncode, done.stderr)
    except subprocess.TimeoutExpired as error:
        said, stopped = error.stdout or b"", f"time limit of {seconds:g} s"
    found: dict[str, Any] = {}
    for line in said.decode().splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may have been cut
            found |= json.loads(line)
    return found | ({"stopped": stopped} if stopped else {})


def _end(code: int, errors: bytes) -> str | None:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    last = errors.decode(errors="replace").strip().rpartition("\n")[2]
    return f"exit code {code}: {last}" if code else None
