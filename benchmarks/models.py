"""The networks that benchmarks measure."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes (He et al. 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images: a stem and three stages of ``depth`` blocks with 16, 32 and 64 channels."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.blocks = nn.Sequential(
            *(BasicBlock(i if n == 0 else o, o, s if n == 0 else 1) for i, o, s in widths for n in range(depth))
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
