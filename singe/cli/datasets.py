"""The data that a command line names: CIFAR-10's files, folders of images, or loaders of the user's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from .. import cifar10
from ..models.batches import head, length
from .references import called, find

KINDS = "cifar10:DIR, imagefolder:DIR or package.module:loader"

BATCH_SIZE, WORKERS, IMAGE_SIZE = 128, 0, 224
"""The default for cifar10: and imagefolder:."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MARGIN = 256 / 224
"""How much larger test images are than the crop taken from their middle."""


@dataclass(frozen=True)
class Data:
    """The data to prune on and to measure accuracy on.

    Attributes:
        train: yields batches, again and again.
        test: likewise, in order; None where there is none.
    """

    train: Iterable[Any]
    test: Iterable[Any] | None


class First:
    """The first batches of a loader, until they hold ``images`` samples."""

    def __init__(self, loader: Iterable[Any], images: int) -> None:
        self._loader, self._images = loader, images

    def __iter__(self) -> Iterator[Any]:
        left = self._images
        for batch in self._loader:
            yield head(batch, left)
            left -= length(batch)
            if left <= 0:
                return


@dataclass(frozen=True)
class Settings:
    """The command line's settings for batches; None where one is not given."""

    batch_size: int | None = None
    workers: int | None = None
    image_size: int | None = None


def load(reference: str, settings: Settings, device: torch.device) -> Data:
    """The data that ``reference`` names.

    Args:
        reference: ``cifar10:DIR``, ``imagefolder:DIR`` or ``package.module:loader``.
        settings: of its batches.
        device: that CIFAR-10 is kept on.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ImportError: torchvision is missing.
        ValueError: no such data, or a setting that does not apply to it.
    """
    kind, _, rest = reference.partition(":")
    if not rest:
        raise ValueError(f"expected {KINDS}, got {reference!r}")
    if kind == "cifar10":
        return _cifar10(Path(rest), settings, device)
    if kind == "imagefolder":
        return _imagefolder(Path(rest), settings)
    return _own(reference, settings)


def _cifar10(directory: Path, settings: Settings, device: torch.device) -> Data:
    for name in ("workers", "image_size"):
        if getattr(settings, name):
            raise ValueError(f"{name} does not apply to cifar10:DIR, whose 32x32 images are kept in memory")
    (x, y), (x_test, y_test) = (cifar10.read(directory, train=train) for train in (True, False))
    loader = cifar10.Loader(x.to(device), y.to(device), settings.batch_size or BATCH_SIZE)
    return Data(loader, cifar10.Ordered(x_test.to(device), y_test.to(device)))


def _imagefolder(directory: Path, settings: Settings) -> Data:
    """Folders ``train`` and maybe ``val`` with a folder for each class, augmented and normalised as for ImageNet."""
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:  # one built for another torch lacks operators
        raise ImportError(
            f"imagefolder:DIR needs the torchvision of torch {torch.__version__}: pip install 'singe[vision]' ({error})"
        ) from error
    if not (directory / "train").is_dir():
        raise FileNotFoundError(f"expected a folder train/ with a folder for each class in {directory}, found none")
    size = settings.image_size or IMAGE_SIZE
    tensors = [transforms.ToTensor(), transforms.Normalize(_IMAGENET_MEAN, _IMAGENET_STD)]
    augmented = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *tensors]
    middle = [transforms.Resize(round(size * _MARGIN)), transforms.CenterCrop(size), *tensors]
    train = ImageFolder(directory / "train", transforms.Compose(augmented))
    common: dict[str, Any] = {
        "batch_size": settings.batch_size or BATCH_SIZE,
        "num_workers": settings.workers or WORKERS,
    }
    if len(train) < common["batch_size"]:
        raise ValueError(
            f"expected a batch size of at most {len(train)}, the number of images, got {common['batch_size']}"
        )
    loader = DataLoader(train, shuffle=True, drop_last=True, **common)
    if not (directory / "val").is_dir():
        return Data(loader, None)
    test = ImageFolder(directory / "val", transforms.Compose(middle))
    if test.classes != train.classes:
        raise ValueError(f"expected the same classes in train/ and val/ of {directory}, got others")
    mixed = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).tolist()  # files come class by class
    return Data(loader, DataLoader(Subset(test, mixed), **common))


def _own(reference: str, settings: Settings) -> Data:
    """A loader; a function that returns one, or (train, test); or that pair itself."""
    found = find(reference)
    given = {name: value for name, value in vars(settings).items() if value is not None}
    if callable(found) and not hasattr(found, "__iter__"):
        parameters = inspect.signature(found).parameters
        if unknown := [name for name in given if name not in parameters]:
            raise ValueError(f"{reference} takes no {' and no '.join(unknown)}")
        found = called(found, reference, **given)
    elif given:
        raise ValueError(f"{', '.join(given)} cannot be passed to {reference}, which is not a function")
    train, test = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    for loader in (train, test):
        if loader is not None and not hasattr(loader, "__iter__"):
            kind = type(loader).__name__
            raise ValueError(f"expected batches or (train, test) from {reference}, got {kind}, which yields nothing")
    return Data(train, test)
