"""Damaged and hostile files: how readers of plans, weights, reports and checkpoints treat mutants of good ones."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from measuring.peak import with_peak
from safetensors.torch import load as load_bytes
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.digest import digest
from singe.removal.surgery import compact
from singe.report import facts
from singe.storage.checkpoint import FILE, Checkpoint
from singe.storage.progress import NeuronProgress
from singe.storage.saved import PLAN_FILE, WEIGHTS_FILE, load, load_plan

ROOM = 1 << 29
"""Bytes of address space that reading may take on top of what is in use; more is an error."""

EXECUTION = {
    "exec", "compile", "marshal.loads", "pickle.find_class", "os.system", "os.exec", "os.posix_spawn",
    "subprocess.Popen", "ctypes.dlopen", "socket.connect",
}  # fmt: skip
"""Audit events of code that is run."""

HOSTILE: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "0", "../../../etc/passwd", "\0",
    "é" * 50, "x" * 10_000, [], {}, [0] * 1000, [[[[[[]]]]]], {"__class__": "os.system"},
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A file and its reader.

    Attributes:
        name: of the file.
        good: its bytes as they should be.
        read: reads it in a directory, as users do.
    """

    name: str
    good: bytes
    read: Callable[[Path], object]


class Bomb:
    """Unpickled, runs code."""

    def __reduce__(self) -> Any:
        return exec, ("import os; os.system('true')",)


def measure(count: int, seed: int) -> dict[str, Any]:
    """Reads ``count`` mutants of each kind of file.

    Returns:
        per file, how many were refused and how many read; other errors, code that ran, memory.
    """
    dice, began = random.Random(seed), time.perf_counter()
    outcomes: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        targets, executed = written(path, seed), Executed()

        def read_all() -> None:
            for target in targets:
                mutants = (mutant(target, dice) for _ in range(count))
                outcomes[target.name] = Counter(outcome(target, path, data, executed) for data in mutants)
                (path / target.name).write_bytes(target.good)

        with confined():
            _, peak = with_peak(read_all, torch.device("cpu"))
    known = {"refused", "read"}
    return {
        "inputs": count * len(targets), "seconds": time.perf_counter() - began,
        "files": {name: {k: found[k] for k in sorted(known)} for name, found in outcomes.items()},
        "errors": {f"{name}: {k}": n for name, found in outcomes.items() for k, n in found.items() if k not in known},
        "executed": sorted(executed.events), "mebibytes_at_most": peak and peak / 2**20,
        "mebibytes_allowed": ROOM >> 20,
    }  # fmt: skip


def written(path: Path, seed: int) -> list[Target]:
    """Prunes a small network with a checkpoint and saves it."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    samples = TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,)))
    loader = DataLoader(samples, batch_size=32, shuffle=True)
    tuning = singe.FineTune(steps=4)
    singe.prune(model, loader, 0.4, finetune=tuning, images=32, progress=False, checkpoint=path).save(path)
    call = json.loads(load_metadata((path / FILE).read_bytes())["singe"])["call"]

    def resume(directory: Path) -> None:
        file = Checkpoint(directory, call)
        progress = file.read(NeuronProgress)
        network = copy.deepcopy(model)
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        if progress is not None:
            compact(network, progress.plan.removed(), optimizer)
            file.restore(network, optimizer)

    readers: dict[str, Callable[[Path], object]] = {
        PLAN_FILE: lambda directory: load_plan(directory).apply(copy.deepcopy(model)),
        WEIGHTS_FILE: lambda directory: load(model, directory),
        facts.FILE: facts.load,
        FILE: resume,
    }
    for read in readers.values():
        read(path)  # loading and compiling on first use is not due to the files
    return [Target(name, (path / name).read_bytes(), read) for name, read in readers.items()]


def outcome(target: Target, path: Path, data: bytes, executed: Executed) -> str:
    """The outcome of reading a mutant."""
    (path / target.name).write_bytes(data)
    try:
        with executed:
            target.read(path)
    except ValueError:
        return "refused"
    except BaseException as error:  # a panic of native code is not an Exception
        return f"{type(error).__name__}: {error}"[:200]
    return "read"


class Executed:
    """Collects the audit events of code that runs inside its ``with`` blocks."""

    def __init__(self) -> None:
        self.events: set[str] = set()
        self._inside = False
        sys.addaudithook(self._hook)  # cannot be removed

    def __enter__(self) -> None:
        self._inside = True

    def __exit__(self, *_: object) -> None:
        self._inside = False

    def _hook(self, event: str, _: object) -> None:
        if self._inside and event in EXECUTION:
            self.events.add(event)


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """Limits the address space to what is in use plus ``ROOM``."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


# -- mutants -----------------------------------------------------------------------------------------------------


def mutant(target: Target, dice: random.Random) -> bytes:
    """One of many kinds of damage."""
    kinds: list[Callable[[bytes, random.Random], bytes]] = [flipped, cut, stretched, moved, foreign]
    if target.name in (PLAN_FILE, facts.FILE):
        kinds += [json_changed] * 5
    else:
        kinds += [header_changed, header_changed, length_changed]
    if target.name == FILE:
        kinds += [signed] * 4
    return dice.choice(kinds)(target.good, dice)


def flipped(data: bytes, dice: random.Random) -> bytes:
    """A few bits, most of them near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8])):
        end = dice.choice([16, 512, len(data)])
        changed[dice.randrange(min(end, len(data)))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def cut(data: bytes, dice: random.Random) -> bytes:
    """The beginning only."""
    return data[: dice.randrange(len(data))]


def stretched(data: bytes, dice: random.Random) -> bytes:
    """Something inserted."""
    place = dice.randrange(len(data) + 1)
    return data[:place] + dice.randbytes(dice.choice([1, 8, 4096])) + data[place:]


def moved(data: bytes, dice: random.Random) -> bytes:
    """A piece of the file over another."""
    changed, size = bytearray(data), dice.randrange(1, 64)
    a, b = (dice.randrange(max(1, len(data) - size)) for _ in range(2))
    changed[a : a + size] = data[b : b + size]
    return bytes(changed)


def foreign(data: bytes, dice: random.Random) -> bytes:
    """A file of another kind."""
    buffer = BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    deep, wide = b"[" * 100_000, b'{"a":' * 50_000
    return dice.choice([b"", pickle.dumps(Bomb()), buffer.getvalue(), deep, wide, dice.randbytes(300), b"\xff" * 16])


def json_changed(data: bytes, dice: random.Random) -> bytes:
    """Well-formed JSON with other values."""
    return json.dumps(changed_values(json.loads(data), dice)).encode()


def header_changed(data: bytes, dice: random.Random) -> bytes:
    """A safetensors header with other values: names, dtypes, shapes, places."""
    return with_header(data, changed_values(header(data), dice))


def length_changed(data: bytes, dice: random.Random) -> bytes:
    """A header that states a wrong length."""
    length = dice.choice([0, 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1, dice.randrange(2 * len(data))])
    return struct.pack("<Q", length) + data[8:]


def signed(data: bytes, dice: random.Random) -> bytes:
    """A checkpoint with other values whose digest is that of these."""
    head = header(data)
    text = json.dumps(changed_values(json.loads(head["__metadata__"]["singe"]), dice))
    head["__metadata__"] = {"singe": text, "digest": digest(text, load_bytes(data))}
    return with_header(data, head)


def changed_values(data: Any, dice: random.Random) -> Any:
    """Plain data in which a few values are changed, missing or repeated."""
    for _ in range(dice.choice([1, 1, 1, 2, 4])):
        places = list(places_of(data))
        if not places:
            break
        holder, key = dice.choice(places)
        way = dice.randrange(4)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif way == 2:
            other, its = dice.choice(places)
            holder[key] = copy.deepcopy(other[its])
        else:
            holder[key] = copy.deepcopy(dice.choice(HOSTILE))
    return data


def places_of(data: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested lists and dicts."""
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, (dict, list)):
            yield from places_of(value)


def header(data: bytes) -> dict[str, Any]:
    """That of a safetensors file."""
    head: dict[str, Any] = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return head


def load_metadata(data: bytes) -> dict[str, str]:
    """The text in the header of a safetensors file."""
    metadata: dict[str, str] = header(data)["__metadata__"]
    return metadata


def with_header(data: bytes, head: Any) -> bytes:
    """A safetensors file with another header."""
    text = json.dumps(head).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


def text(found: dict[str, Any]) -> str:
    """A few lines on what came out."""
    lines = [f"{name}: {n['refused']} refused, {n['read']} read" for name, n in found["files"].items()]
    lines += [f"{error}: {n} times" for error, n in found["errors"].items()]
    ran, peak = ", ".join(found["executed"]) or "none", found["mebibytes_at_most"]
    memory = "unknown" if peak is None else f"{peak:.1f} MiB at most"
    lines.append(f"code that ran: {ran}; memory on top of what was in use: {memory}")
    return "\n".join([f"{found['inputs']} files in {found['seconds']:.0f} s", *lines])
