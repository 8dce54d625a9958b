"""Networks of residual blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry
from .parts import Gate, conv_bn


class Basic(nn.Module):
    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """A bottleneck; its middle convolution may be grouped and gated."""

    def __init__(self, channels: int, width: int, stride: int = 1, groups: int = 1, gate: int = 0) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=groups, bias=False)
        self.bn2, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.se = Gate(width, gate, nn.ReLU, nn.Sigmoid) if gate else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.downsample = nn.Identity()
        if stride != 1 or channels != 2 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 2 * width, 1, stride, bias=False), nn.BatchNorm2d(2 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.se(self.relu(self.bn2(self.conv2(out))))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.relu(out)


class OptionA(Basic):
    """A block that halves the image; its shortcut has no weights and adds channels of zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width)
        self.conv1, self.added = nn.Conv2d(channels, width, 3, 2, 1, bias=False), (width - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added, self.added), "constant", 0)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self, width: int, *blocks: nn.Module, last: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layers = nn.Sequential(*blocks)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(last, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layers(x))
        return self.fc(torch.flatten(x, 1))


class SplitBlock(nn.Module):
    """Res2Net's block: parts of the channels pass through one convolution after another.

    Args:
        channels: in and out.
        width: of a part.
        by_width: whether the parts are told by their width, or by their number.
    """

    def __init__(self, channels: int, width: int, by_width: bool) -> None:
        super().__init__()
        self.width, self.by_width, self.scale = width, by_width, 4
        self.conv1, self.bn1 = nn.Conv2d(channels, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.conv3, self.bn3 = nn.Conv2d(4 * width, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        parts = torch.split(out, self.width, 1) if self.by_width else torch.chunk(out, self.scale, 1)
        done: list[Tensor] = []
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            part = parts[i] if i == 0 else done[-1] + parts[i]
            done.append(self.relu(bn(conv(part))))
        out = self.bn3(self.conv3(torch.cat([*done, parts[-1]], 1)))
        out += x
        return self.relu(out)


class RepBlock(nn.Module):
    """RepVGG's block: the sum of two convolutions and, where the shape stays, the input, each with a batch norm."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.dense = conv_bn(channels, width, stride=stride, act=nn.Identity)
        self.small = conv_bn(channels, width, 1, stride=stride, act=nn.Identity)
        self.identity = nn.BatchNorm2d(width) if channels == width and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        same = 0 if self.identity is None else self.identity(x)
        return F.relu(self.dense(x) + self.small(x) + same)


class RepVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(RepBlock(3, 8, 2), RepBlock(8, 8, 1), RepBlock(8, 12, 2))
        self.gap, self.linear = nn.AdaptiveAvgPool2d(output_size=1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.gap(self.stages(x))
        out = out.view(out.size(0), -1)
        return self.linear(out)


class Narrow(nn.Module):
    """YOLO's bottleneck: two convolutions around which the input is added."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv_bn(channels, hidden, 1, act=nn.SiLU), conv_bn(hidden, channels, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class CrossStage(nn.Module):
    """Two convolutions side by side, one with blocks behind it, joined."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv_bn(channels, width, 1, act=nn.SiLU), conv_bn(channels, width, 1, act=nn.SiLU)
        self.m, self.cv3 = Narrow(width, 5), conv_bn(2 * width, channels, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class HalfStage(nn.Module):
    """One convolution whose second half goes through the blocks; all that comes about is joined."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.cv1, self.m = conv_bn(channels, 2 * width, 1, act=nn.SiLU), nn.ModuleList([Narrow(width, 5)])
        self.cv2 = conv_bn(3 * width, channels, 1, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y: list[Any] = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Darknet(nn.Module):
    def __init__(self, stage: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.stage = conv_bn(3, 8, stride=2, act=nn.SiLU), stage(8, 6)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(self.stem(x)))


RESIDUAL = {
    "resnet basic": Entry(
        lambda: ResNet(8, Basic(8, 8), Basic(8, 12, 2), last=12),
        free={"conv1": 8, "layers.0.conv1": 8, "layers.1.conv1": 12, "layers.1.conv2": 12},
        frozen={"fc": "networkoutput"},
    ),
    "resnet bottleneck": Entry(
        lambda: ResNet(8, Bottleneck(8, 4), Bottleneck(8, 6, 2), last=12),
        free={
            "conv1": 8, "layers.0.conv1": 4, "layers.0.conv2": 4, "layers.1.conv1": 6, "layers.1.conv2": 6,
            "layers.1.conv3": 12,
        },
        frozen={"fc": "networkoutput"},
    ),
    "resnet option a": Entry(
        lambda: ResNet(4, Basic(4, 4), OptionA(4, 8), last=8),
        free={"conv1": 4, "layers.0.conv1": 4, "layers.1.conv1": 8},
        frozen={"layers.1.conv2": "fixedwidth", "fc": "networkoutput"},
    ),
    "resnext": Entry(
        lambda: ResNet(8, Bottleneck(8, 8, groups=2), last=16),
        free={"conv1": 8, "layers.0.conv1": 4, "layers.0.conv2": 4, "layers.0.conv3": 16},
    ),
    "regnet": Entry(
        lambda: ResNet(8, Bottleneck(8, 8, 2, groups=2, gate=3), last=16),
        free={"conv1": 8, "layers.0.conv1": 4, "layers.0.conv2": 4, "layers.0.se.fc1": 3, "layers.0.conv3": 16},
    ),
    "res2net": Entry(
        lambda: ResNet(8, SplitBlock(8, 4, by_width=True), last=8), free={"conv1": 8}, doubtful=["layers.0.conv1"]
    ),
    "res2net by number": Entry(
        lambda: ResNet(8, SplitBlock(8, 4, by_width=False), last=8),
        free={"conv1": 8, "layers.0.conv1": 4, "layers.0.convs.2": 4},
    ),
    "repvgg": Entry(RepVGG, free={"stages.0.dense.0": 8, "stages.2.dense.0": 12}),
    "cross stage": Entry(
        lambda: Darknet(CrossStage),
        free={"stem.0": 8, "stage.cv1.0": 6, "stage.cv2.0": 6, "stage.m.cv1.0": 5, "stage.cv3.0": 8},
    ),
    "half stage": Entry(
        lambda: Darknet(HalfStage), free={"stem.0": 8, "stage.cv1.0": 6, "stage.m.0.cv1.0": 5, "stage.cv2.0": 8}
    ),
}  # fmt: skip
