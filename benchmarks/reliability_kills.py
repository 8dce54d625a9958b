"""Runs that are killed at random moments and made again, against an undisturbed one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from measuring.isolated import findings
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from singe import demo
from singe.storage.checkpoint import FILE

SCRIPT = Path(__file__).with_name("reliability_run.py")
LIMIT = 600
"""Seconds that a run may take."""


@dataclass(frozen=True)
class Kill:
    """One run that was killed.

    Attributes:
        moment: seconds from the start of its process, interpreter and imports included.
        groups: number done according to its checkpoint; None where there was none yet.
        same_plan, same_weights: whether the same call, made again, gave those of the undisturbed run, bit for bit.
    """

    moment: float
    groups: int | None
    same_plan: bool
    same_weights: bool


def measure(count: int, seed: int) -> dict[str, Any]:
    """Kills ``count`` runs at moments spread evenly at random over the time that a run takes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        weights = path / "weights.safetensors"
        torch.manual_seed(seed)
        loader = DataLoader(demo.digits()[0], batch_size=64, shuffle=True)
        save_file(demo.train(demo.DigitNet(), loader, epochs=4).state_dict(), weights)
        began = time.perf_counter()
        whole = run(weights, path / "whole")
        seconds = time.perf_counter() - began
        moments = random.Random(seed)
        kills = [kill(weights, path / str(i), moments.uniform(0, seconds), whole) for i in range(count)]
    return {"seconds": seconds, "groups": whole["groups"], "kills": [asdict(k) for k in kills]}


def run(weights: Path, directory: Path) -> dict[str, Any]:
    """The output of a run that finishes."""
    found = findings([sys.executable, str(SCRIPT), str(weights), str(directory)], LIMIT)
    if "stopped" in found:
        raise RuntimeError(f"expected the run to end, but: {found['stopped']}")
    return found


def kill(weights: Path, directory: Path, moment: float, whole: dict[str, Any]) -> Kill:
    """Kills a run, makes it again and compares."""
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(weights), str(directory)], stdout=subprocess.DEVNULL)
    time.sleep(moment)
    process.kill()
    process.wait()
    groups = done(directory / FILE)
    again = run(weights, directory)
    return Kill(moment, groups, again["plan"] == whole["plan"], again["weights"] == whole["weights"])


def done(checkpoint: Path) -> int | None:
    """How many groups a checkpoint says are done."""
    if not checkpoint.exists():
        return None
    with safe_open(checkpoint, "pt") as file:
        return len(json.loads(file.metadata()["singe"])["history"])


def text(found: dict[str, Any]) -> str:
    """One line on what came out."""
    kills = found["kills"]
    same = sum(k["same_plan"] and k["same_weights"] for k in kills)
    reached = [k["groups"] for k in kills]
    return (
        f"{same} of {len(kills)} killed runs ended with the plan and weights of the undisturbed one "
        f"({found['seconds']:.1f} s, {found['groups']} groups); groups done when killed: {reached}"
    )
