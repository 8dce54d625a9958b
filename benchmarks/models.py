"""The networks that benchmarks measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from singe.demo import Block


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: a stem and three stages of ``depth`` blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.blocks = nn.Sequential(
            *(Block(i if n == 0 else o, o, s if n == 0 else 1) for i, o, s in widths for n in range(depth))
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> logits [B, 10]."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def resnet56(weights: str | None = None) -> CifarResNet:
    """ResNet-56, 855,770 parameters, in eval mode; ``weights`` is a safetensors file."""
    model = CifarResNet(9)
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights))
    return model.eval()


def random_images(count: int, classes: int = 10, size: int = 32) -> tuple[Tensor, Tensor]:
    """A batch of noise (x, y), for timing."""
    return torch.randn(count, 3, size, size), torch.randint(classes, (count,))
