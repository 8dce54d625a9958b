"""Networks of convolutions in rows and branches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry


class VGG(nn.Module):
    """A flatten that leaves four columns of a linear layer to every channel."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
            nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(10 * 2 * 2, 16), nn.ReLU(True), nn.Dropout(0.5),
            nn.Linear(16, 12), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


class Fire(nn.Module):
    def __init__(self, channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(channels, squeeze, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeeze, expand, 1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat(
            [self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1
        )


class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(8, 4, 6),
            Fire(12, 5, 6),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(12, 5, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        hidden = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(hidden)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, layers: int, channels: int, growth: int, hidden: int) -> None:
        super().__init__()
        for i in range(layers):
            self[f"layer{i}"] = DenseLayer(channels + i * growth, growth, hidden)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False))
        self.features.add_module("block1", DenseBlock(2, 6, 3, 5))
        transition = nn.Sequential(
            nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 6, 1, bias=False), nn.AvgPool2d(2, stride=2)
        )
        self.features.add_module("transition1", transition)
        self.features.add_module("block2", DenseBlock(2, 6, 3, 5))
        self.features.add_module("norm5", nn.BatchNorm2d(12))
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.features(x), inplace=True)
        out = torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1)
        return self.classifier(out)


class Unit(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int | tuple[int, int], **options: int) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2)
        self.conv = nn.Conv2d(channels, width, kernel, padding=padding, bias=False, **options)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Inception(nn.Module):
    """Four branches of 4, 5, 3 and 4 channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch1 = Unit(channels, 4, 1)
        self.branch2 = nn.Sequential(Unit(channels, 3, 1), Unit(3, 5, 3))
        self.branch3 = nn.Sequential(Unit(channels, 4, 1), Unit(4, 3, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), Unit(channels, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Auxiliary(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = Unit(channels, 4, 1), nn.Linear(4 * 2 * 2, 6), nn.Linear(6, 5)
        self.dropout = nn.Dropout(0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.adaptive_avg_pool2d(x, (2, 2)))
        x = F.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(self.dropout(x))


class GoogLeNetOutputs(NamedTuple):
    logits: Tensor
    aux: Tensor | None


class GoogLeNet(nn.Module):
    """An auxiliary classifier that lives in train mode only, behind inputs normalised channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.maxpool1 = Unit(3, 8, 3, stride=2), nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.inception1, self.aux, self.inception2 = Inception(8), Auxiliary(16), Inception(16)
        self.avgpool, self.dropout, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Dropout(0.2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        channels = [torch.unsqueeze(x[:, i], 1) * (0.45 + i / 100) + 0.02 * i for i in range(3)]
        x = self.inception1(self.maxpool1(self.conv1(torch.cat(channels, 1))))
        aux = self.aux(x) if self.training else None
        x = torch.flatten(self.avgpool(self.inception2(x)), 1)
        x = self.fc(self.dropout(x))
        return GoogLeNetOutputs(x, aux) if self.training else x


class Factorised(nn.Module):
    """Rows and columns in place of squares, an average pool beside them, and a fork at the end of a branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch7x7_1, self.branch7x7_2 = Unit(channels, 3, 1), Unit(3, 4, (1, 7))
        self.branch7x7_3, self.branch3x3_1 = Unit(4, 5, (7, 1)), Unit(channels, 4, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(4, 3, (1, 3)), Unit(4, 3, (3, 1))
        self.branch_pool = Unit(channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch7x7 = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        branch3x3 = self.branch3x3_1(x)
        branch3x3 = torch.cat([self.branch3x3_2a(branch3x3), self.branch3x3_2b(branch3x3)], 1)
        branch_pool = self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([branch7x7, branch3x3, branch_pool], 1)


class Reduction(nn.Module):
    """A strided branch beside a max pool of the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(channels, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch3x3(x), F.max_pool2d(x, kernel_size=3, stride=2, padding=1)], 1)


class InceptionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.reduction, self.fc = Unit(3, 6, 3), Factorised(6), Reduction(16), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduction(self.mixed(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _inception(name: str) -> dict[str, int]:
    widths = {"branch1": 4, "branch2.0": 3, "branch2.1": 5, "branch3.0": 4, "branch3.1": 3, "branch4.1": 4}
    return {f"{name}.{branch}.conv": width for branch, width in widths.items()}


PLAIN = {
    "vgg": Entry(
        VGG,
        free={"features.0": 8, "features.3": 10, "classifier.0": 16, "classifier.3": 12},
        frozen={"classifier.6": "networkoutput"},
    ),
    "squeezenet": Entry(
        SqueezeNet,
        free={
            "features.0": 8, "features.3.squeeze": 4, "features.3.expand1x1": 6, "features.3.expand3x3": 6,
            "features.4.squeeze": 5, "features.4.expand1x1": 6, "features.4.expand3x3": 6,
        },
        frozen={"classifier.1": "networkoutput"},
    ),
    "densenet": Entry(
        DenseNet,
        free={
            "features.conv0": 6, "features.transition1.2": 6,
            **{f"features.block{b}.layer{i}.conv1": 5 for b in (1, 2) for i in range(2)},
            **{f"features.block{b}.layer{i}.conv2": 3 for b in (1, 2) for i in range(2)},
        },
    ),
    "googlenet": Entry(GoogLeNet, free={"conv1.conv": 8, **_inception("inception1"), **_inception("inception2")}),
    "inception": Entry(
        InceptionNet,
        free={
            "stem.conv": 6, "mixed.branch7x7_1.conv": 3, "mixed.branch7x7_2.conv": 4, "mixed.branch7x7_3.conv": 5,
            "mixed.branch3x3_1.conv": 4, "mixed.branch3x3_2a.conv": 3, "mixed.branch3x3_2b.conv": 3,
            "mixed.branch_pool.conv": 5, "reduction.branch3x3.conv": 4,
        },
        frozen={"fc": "networkoutput"},
    ),
}  # fmt: skip
