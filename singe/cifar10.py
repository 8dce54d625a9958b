"""CIFAR-10 from its canonical binary files, kept in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

TRAINING, TEST = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)
RECORD = 1 + 3 * 32 * 32
"""Bytes of an image in a file: its label, then its pixels by channel, row and column."""


def read(directory: str | os.PathLike[str], *, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of all records, 50,000 to train and 10,000 to test on.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not consist of records.
    """
    parts = [_records(Path(directory) / name) for name in (TRAINING if train else TEST)]
    records = np.concatenate(parts)
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), labels


def _records(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: https://www.cs.toronto.edu/~kriz/cifar.html has it, in the binary version of CIFAR-10"
        )
    values = np.fromfile(path, dtype=np.uint8)
    records = values[: len(values) // RECORD * RECORD].reshape(-1, RECORD)
    if not len(records) or len(values) % RECORD or records[:, 0].max() > 9:
        raise ValueError(f"expected {path} to hold records of {RECORD} bytes that begin with a label from 0 to 9")
    return records


def normalised(images: Tensor) -> Tensor:
    """float32 images, standardised with the usual mean and deviation."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Loader:
    """Shuffled batches with the usual augmentation: crops from four pixels of padding, horizontal flips.

    Draws from torch's global generator on the CPU, so that seeding it seeds the loader, on every device alike. Batches
    are on the device of ``images`` and ``labels``; an incomplete last batch is left out.

    Raises:
        ValueError: there are fewer images than a batch has.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 128, *, augment: bool = True) -> None:
        if not 0 < batch_size <= len(images):
            raise ValueError(f"expected a batch size from 1 to {len(images)}, the number of images, got {batch_size}")
        self._images, self._labels, self._batch_size, self._augment = images, labels, batch_size, augment

    def __len__(self) -> int:
        return len(self._images) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._images))
        for i in range(len(self)):
            chosen = order[i * self._batch_size : (i + 1) * self._batch_size]
            x = normalised(self._images[chosen])
            yield (_augmented(x) if self._augment else x), self._labels[chosen]


def _augmented(x: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, len(x), 1))
    rows = (top + torch.arange(32))[:, None, :, None]
    flip = torch.rand(len(x), 1) < 0.5
    columns = torch.where(flip, left + torch.arange(31, -1, -1), left + torch.arange(32))[:, None, None, :]
    samples = torch.arange(len(x))[:, None, None, None]
    return padded[samples, torch.arange(3)[None, :, None, None], rows, columns]


class Ordered:
    """All images once and in order, normalised but not augmented."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 500) -> None:
        self._images, self._labels, self._batch_size = images, labels, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(self._images.split(self._batch_size), self._labels.split(self._batch_size), strict=True):
            yield normalised(x), y
