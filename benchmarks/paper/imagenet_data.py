"""ImageNet from a folder, and networks for it: needs torchvision, which nothing else here does."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, models, transforms

from paper.recipe import Baseline, checksum, streams

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def baseline(options: argparse.Namespace) -> Baseline:
    """A network of torchvision, and the images of the folders DATA/train/CLASS and DATA/val/CLASS.

    Weights are those of ``--weights``, a safetensors file with torchvision's names, or torchvision's own, of version 1.

    Raises:
        FileNotFoundError: there are no such folders.
    """
    network = models.get_model(options.model, weights=None if options.weights else "IMAGENET1K_V1")
    if options.weights:
        network.load_state_dict(load_file(options.weights))
    train, test = folders(options.data)
    workers = {"num_workers": options.workers, "pin_memory": options.device != "cpu"}
    loader = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, **workers)
    device = torch.device(options.device)

    def batches(of: Dataset) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in DataLoader(of, options.batch_size, **workers):
            yield x.to(device), y.to(device)

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        model.eval()
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(test)) / len(test)

    weights = checksum(options.weights) if options.weights else "torchvision IMAGENET1K_V1"
    return Baseline(
        name=options.model,
        model=network.to(device, memory_format=torch.channels_last).eval(),
        loader=loader,
        accuracy=accuracy,
        held_out=lambda images: batches(Subset(test, spread(len(test), images))),
        checksums={"weights": weights, "train": listing(train), "test": listing(test)},
        device=device,
        ignore=streams(network) if options.open == "inner" else (),
    )


def folders(data: Path) -> tuple[datasets.ImageFolder, datasets.ImageFolder]:
    """Images to train on, cropped and mirrored at random, and to test on, the usual centre."""
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    random = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(256), transforms.CenterCrop(224)]
    return (
        datasets.ImageFolder(data / "train", transforms.Compose(random + normalise)),
        datasets.ImageFolder(data / "val", transforms.Compose(centre + normalise)),
    )


def listing(images: datasets.ImageFolder) -> str:
    """SHA-256 of the names and sizes of all files, in their order."""
    files = [Path(path) for path, _ in images.samples]
    names = [f"{path.relative_to(images.root)} {path.stat().st_size}" for path in files]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def spread(length: int, count: int) -> range:
    """``count`` numbers below ``length``, evenly apart: images in folders are ordered by class."""
    return range(0, length, max(1, length // count))[:count]
