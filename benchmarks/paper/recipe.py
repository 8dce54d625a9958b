"""The protocol that all rows of all tables share: the network, its data, fine-tuning and what is measured."""

from __future__ import annotations

import argparse
import copy
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from models import load
from torch import Tensor, nn

import singe
from singe.cifar10 import Loader, Ordered, normalised, read
from singe.sizes import count_macs
from singe.task import Task
from singe.training.accuracy import accuracy
from singe.training.data import Stream
from singe.training.finetune import Tuner, When
from singe.training.recalibration import recalibrate, running_norms

RECALIBRATION_IMAGES = 2048
LR = singe.FineTune().learning_rate
"""The default learning rate of fine-tuning."""
_TUNING, _RECALIBRATION, SCORING = range(1 << 19, (1 << 19) + 3)
"""Phases of a seed that batches are drawn in; a run of singe.prune uses lower ones."""


@dataclass(frozen=True)
class Baseline:
    """A trained network, its data, and how networks made of it are trained and judged.

    Attributes:
        name: of the network.
        model: in eval mode, in channels_last; never modified.
        loader: of training batches, augmented.
        accuracy: the share of all test images that a network classifies correctly.
        held_out: yields some of the test images, in batches (x, y).
        checksums: SHA-256 of weights and data.
        device: of all of it.
        ignore: the modules whose groups are left whole.
    """

    name: str
    model: nn.Module
    loader: Any
    accuracy: Callable[[nn.Module], float]
    held_out: Callable[[int], Iterable[tuple[Tensor, Tensor]]]
    checksums: dict[str, str]
    device: torch.device
    ignore: tuple[str, ...]
    task: Task = field(default_factory=Task)

    def batches(self, seed: int, phase: int) -> Stream:
        """The loader's batches in the order of a seed, the same for every method."""
        stream = Stream(self.loader, self.device, self.task)
        stream.restart((seed << 20) + phase)
        return stream

    def tune(self, model: nn.Module, plan: singe.FineTune, seed: int) -> None:
        """Fine-tunes in place after pruning, with the loop that ``singe.prune`` has."""
        Tuner(plan, model, self.batches(seed, _TUNING), self.task, unpruned=self.model).train_stage()

    def folded(self) -> nn.Module:
        """The network with its batch norms folded away, as far as they can be."""
        return singe.fold_batchnorm(self.model, self.batches(0, SCORING).take(4)[0]).model

    def recalibrated_top1(self, model: nn.Module, seed: int) -> float | None:
        """The same with the batch norms' statistics re-estimated; None without batch norms."""
        if not running_norms(model):
            return None
        model = copy.deepcopy(model)
        recalibrate(model, self.batches(seed, _RECALIBRATION), self.task, RECALIBRATION_IMAGES)
        return self.accuracy(model)

    def described(self, model: nn.Module) -> dict[str, Any]:
        """How much smaller a network is: shares of the parameters, cut out or zero, and multiply-adds that are gone."""
        x = self.batches(0, SCORING).take(1)[0]
        macs, macs_before = count_macs(model, x), count_macs(self.model, x)
        return {
            "params_removed": 1 - _nonzeros(model) / _nonzeros(self.model),
            "macs_removed": 1 - macs / macs_before,
        }


def cifar10_baseline(options: argparse.Namespace) -> Baseline:
    """The network and the data that the options name."""
    model = load(options.model, options.weights).to(options.device, memory_format=torch.channels_last)
    train, test = ([part.to(options.device) for part in read(options.data, train=train)] for train in (True, False))
    train_files, test_file = sorted(options.data.glob("data_batch_*.bin")), options.data / "test_batch.bin"

    def held_out(images: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(*(part[:images].split(100) for part in test), strict=True):
            yield normalised(x), y

    return Baseline(
        name=options.model,
        model=model,
        loader=Loader(*train, options.batch_size),
        accuracy=lambda model: accuracy(model, Ordered(*test, batch_size=100)),
        held_out=held_out,
        checksums={"weights": checksum(options.weights), "train": checksum(*train_files), "test": checksum(test_file)},
        device=torch.device(options.device),
        ignore=streams(model) if options.open == "inner" else (),
    )


def training(options: argparse.Namespace, steps: int, when: When) -> singe.FineTune:
    """The fine-tuning that all methods get."""
    return singe.FineTune(steps=steps, when=when, lr=options.lr, hints=options.hints, precision=options.precision)


def _nonzeros(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters())


def streams(model: nn.Module) -> tuple[str, ...]:
    """A glob for the layers that write a network's residual streams, ours or torchvision's; empty without streams."""
    names = [name for name, _ in model.named_modules()]
    known = ("*.conv3", "*.conv2", "features.*.conv.2", "blocks.*.layers.2")
    return next(((glob,) for glob in known if any(fnmatchcase(name, glob) for name in names)), ())


def checksum(*paths: Path) -> str:
    """SHA-256 of some files, one after the other."""
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
