"""The protocol that all rows of all tables share: the network, its data, fine-tuning and what is measured."""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cifar10_data import Loader, accuracy, read
from models import load
from torch import Tensor, nn

import singe
from singe.data import Stream
from singe.finetune import Tuner
from singe.recalibration import recalibrate, running_norms
from singe.result import count_macs, count_parameters
from singe.task import Task

RECALIBRATION_IMAGES = 2048
_TUNING, _RECALIBRATION, SCORING = range(1 << 19, (1 << 19) + 3)
"""Phases of a seed that batches are drawn in; a run of singe.prune has those below."""


@dataclass(frozen=True)
class Baseline:
    """A trained network, its data, and how networks made of it are trained and judged.

    Attributes:
        name: of the network.
        model: in eval mode, in channels_last; never modified.
        loader: of training batches, augmented.
        test: images and labels that count.
        checksums: SHA-256 of weights and data.
        device: of all of it.
        ignore: the modules whose groups are left whole.
    """

    name: str
    model: nn.Module
    loader: Any
    test: tuple[Tensor, Tensor]
    checksums: dict[str, str]
    device: torch.device
    ignore: tuple[str, ...]
    task: Task = field(default_factory=Task)

    def batches(self, seed: int, phase: int) -> Stream:
        """The loader's batches as a seed orders them: for every method the same."""
        stream = Stream(self.loader, self.device, self.task)
        stream.restart((seed << 20) + phase)
        return stream

    def tune(self, model: nn.Module, plan: singe.FineTune, seed: int) -> None:
        """Fine-tunes in place after pruning, with the loop that ``singe.prune`` has."""
        Tuner(plan, model, self.batches(seed, _TUNING), self.task, pauses=1, unpruned=self.model).pause()

    def top1(self, model: nn.Module) -> float:
        """Share of the test images that are answered right."""
        return accuracy(model, *self.test, batch_size=100)

    def recalibrated_top1(self, model: nn.Module, seed: int) -> float | None:
        """The same with the batch norms' statistics measured anew; None where there are none."""
        if not running_norms(model):
            return None
        model = copy.deepcopy(model)
        recalibrate(model, self.batches(seed, _RECALIBRATION), self.task, RECALIBRATION_IMAGES)
        return self.top1(model)

    def described(self, model: nn.Module) -> dict[str, Any]:
        """How much smaller a network is: shares of the parameters and multiply-adds that are gone."""
        x = self.batches(0, SCORING).take(1)[0]
        macs, macs_before = count_macs(model, x), count_macs(self.model, x)
        return {
            "params_removed": 1 - count_parameters(model) / count_parameters(self.model),
            "macs_removed": 1 - macs / macs_before,
        }


def cifar10_baseline(options: argparse.Namespace) -> Baseline:
    """The network and the data that the options name."""
    model = load(options.model, options.weights).to(options.device, memory_format=torch.channels_last)
    parts = {train: [p.to(options.device) for p in read(options.data, train=train)] for train in (True, False)}
    files = sorted(Path(options.data).glob("data_batch_*.bin")), [Path(options.data) / "test_batch.bin"]
    return Baseline(
        name=options.model,
        model=model,
        loader=Loader(*parts[True], options.batch_size),
        test=(parts[False][0], parts[False][1]),
        checksums={"weights": checksum(options.weights), "train": checksum(*files[0]), "test": checksum(*files[1])},
        device=torch.device(options.device),
        ignore=streams(options.model) if options.open == "inner" else (),
    )


def streams(name: str) -> tuple[str, ...]:
    """Globs for what writes the residual streams of a network for CIFAR-10."""
    if name == "mobilenet_v2":
        return ("blocks.*.layers.1", "blocks.*.layers.2")
    return ("*.conv2",) if name.startswith("resnet") else ()


def checksum(*paths: Path) -> str:
    """SHA-256 of some files, one behind the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._start, 3)
