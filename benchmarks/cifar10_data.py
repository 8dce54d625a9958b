"""CIFAR-10 from its canonical binary files, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def read(directory: str | Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of all records, 50,000 to train and 10,000 to test on.

    Raises:
        FileNotFoundError: says which script fetches the files.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    paths = [Path(directory) / name for name in names]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: python benchmarks/fetch_cifar10.py {directory}")
    records = np.concatenate([np.fromfile(path, dtype=np.uint8).reshape(-1, 3073) for path in paths])
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), labels


def normalised(images: Tensor) -> Tensor:
    """float32 images with the usual mean and deviation taken out."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Loader:
    """Shuffled batches with the usual augmentation: crops from four pixels of padding, horizontal flips.

    Draws from torch's global generator on the CPU, so that seeding it seeds the loader, on every device alike. Batches
    are where ``images`` and ``labels`` are; a last one that would not be full is left out.

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


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Share of images answered right, in eval mode."""
    model.eval()
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return sum(int((model(normalised(x)).argmax(1) == y).sum()) for x, y in parts) / len(images)
