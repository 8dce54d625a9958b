"""Batches to measure on: CIFAR-10 if its folder is given, noise otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from models import random_images
from torch import Tensor

from singe.cifar10 import Loader, normalised, read

Batch = tuple[Tensor, Tensor]


def batches(name: str, data: Path | None, size: int, count: int, device: torch.device) -> list[Batch]:
    """``count`` batches of ``size`` images for a network, no image twice; from torch's generator on the CPU."""
    if data is None:
        found = [random_images(size, name) for _ in range(count)]
    else:
        images, labels = read(data, train=True)
        chosen = torch.randperm(len(images))[: count * size].split(size)
        found = [(normalised(images[part]), labels[part]) for part in chosen]
    return [(x.to(device), y.to(device)) for x, y in found]


def loader(name: str, data: Path | None, size: int, device: torch.device) -> Iterable[Batch]:
    """The loader that ``singe.prune`` draws its batches from."""
    if data is None:
        return batches(name, None, size, 4, device)
    return Loader(*(part.to(device) for part in read(data, train=True)), size, augment=False)
