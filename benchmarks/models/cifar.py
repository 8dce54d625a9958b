"""Networks for 32x32 images in ten classes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from models.imagenet import VGG16
from singe.demo import Block

Shortcut = Literal["A", "B"]


class CifarResNet(nn.Module):
    """ResNet for small images (He et al. 2016): a stem and three stages with 16, 32 and 64 channels.

    Args:
        depth: blocks in a stage, of two convolutions each; 6 * depth + 2 layers in all.
        shortcut: where the shape changes, "A": pixels skipped and channels of zeros, without parameters, or "B": a 1x1
            convolution with batch norm.
    """

    def __init__(self, depth: int, shortcut: Shortcut = "B") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        stages = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        self.blocks = nn.Sequential(
            *(_block(i if n == 0 else o, o, s if n == 0 else 1, shortcut) for i, o, s in stages for n in range(depth))
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> logits [B, 10]."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def _block(inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> Block:
    block = Block(inputs, outputs, stride)
    if shortcut == "A" and inputs != outputs:
        block.down = ZeroShortcut(outputs - inputs)
    return block


class ZeroShortcut(nn.Module):
    """Every other pixel of the input between ``channels`` channels of zeros, half before and half after (option A)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._before, self._after = channels // 2, channels - channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + channels, H / 2, W / 2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self._before, self._after))


class CifarVGG(nn.Module):
    """VGG-16 with batch norm (Simonyan and Zisserman 2015) for small images: 13 convolutions and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in VGG16.STAGES:
            for outputs in stage:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> features [B, 512, 1, 1] -> logits [B, 10]."""
        return self.fc(self.features(x).flatten(1))


class InvertedResidual(nn.Module):
    """A 1x1 convolution widens, a 3x3 one works on each channel alone, a 1x1 one narrows (Sandler et al. 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, widening: int) -> None:
        super().__init__()
        inner = inputs * widening
        widen = [_conv_bn_relu6(inputs, inner, 1)] if widening > 1 else []
        depthwise = _conv_bn_relu6(inner, inner, 3, stride, groups=inner)
        narrow = [nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.layers = nn.Sequential(*widen, depthwise, *narrow)
        self._adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        return x + self.layers(x) if self._adds else self.layers(x)


class CifarMobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) for small images: the stem and the second stage keep the size."""

    # widening, output channels, blocks, stride of the first
    STAGES = (
        (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(3, 32, 3)
        blocks = []
        inputs = 32
        for widening, outputs, count, stride in self.STAGES:
            for n in range(count):
                blocks.append(InvertedResidual(inputs, outputs, stride if n == 0 else 1, widening))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv_bn_relu6(inputs, 1280, 1)
        self.fc = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> features [B, 1280, 4, 4] -> logits [B, 10]."""
        return self.fc(self.head(self.blocks(self.stem(x))).mean((2, 3)))


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


def perceptron() -> nn.Module:
    """Three linear layers on all pixels, without batch norms."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)
    )  # fmt: skip
