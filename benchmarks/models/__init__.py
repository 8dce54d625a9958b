"""The networks that benchmarks measure: :data:`MODELS`, :func:`load`, and noise for them to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from models.cifar import CifarMobileNetV2, CifarResNet, CifarVGG, perceptron
from models.imagenet import VGG16, ResNet50


@dataclass(frozen=True)
class Network:
    """A kind of network: how to make one, and the side of its images and the number of their classes."""

    make: Callable[[], nn.Module]
    side: int = 32
    classes: int = 10


MODELS: dict[str, Network] = {
    "resnet20": Network(partial(CifarResNet, 3)),
    "resnet56": Network(partial(CifarResNet, 9)),
    "resnet110": Network(partial(CifarResNet, 18)),
    "resnet20_a": Network(partial(CifarResNet, 3, "A")),
    "resnet56_a": Network(partial(CifarResNet, 9, "A")),
    "resnet110_a": Network(partial(CifarResNet, 18, "A")),
    "vgg16_bn": Network(CifarVGG),
    "mobilenet_v2": Network(CifarMobileNetV2),
    "perceptron": Network(perceptron),
    "vgg16": Network(VGG16, side=224, classes=1000),
    "resnet50": Network(ResNet50, side=224, classes=1000),
}
CIFAR10_MODELS = [name for name, network in MODELS.items() if network.side == 32]


def load(name: str, weights: str | Path | None = None) -> nn.Module:
    """A network of :data:`MODELS` in eval mode.

    Args:
        name: of the network.
        weights: a safetensors file with all of its parameters and buffers; None for random ones.

    Raises:
        ValueError: there is no such network.
        RuntimeError: the weights are another network's.
    """
    if name not in MODELS:
        raise ValueError(f"expected a model among {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name].make()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model.eval()


def random_images(count: int, name: str = "resnet56") -> tuple[Tensor, Tensor]:
    """A batch of noise (x, y) such as a network of :data:`MODELS` takes, for timing."""
    network = MODELS[name]
    return torch.randn(count, 3, network.side, network.side), torch.randint(network.classes, (count,))
