"""Small networks with features that library models seldom have: :data:`NETWORKS`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

CLASSES = 5


def block(inputs: int, outputs: int) -> nn.Sequential:
    """A convolution that keeps positions, batch norm, relu."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Down twice, up twice by transposed convolutions, concatenated with the values from the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(3, 12), block(12, 24), block(24, 48)
        self.up2, self.merge2 = nn.ConvTranspose2d(48, 24, 2, stride=2), block(48, 24)
        self.up1, self.merge1 = nn.ConvTranspose2d(24, 12, 2, stride=2), block(24, 12)
        self.head = nn.Conv2d(12, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, CLASSES, H, W]."""
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.bottom(F.max_pool2d(b, 2))
        y = self.merge2(torch.cat([self.up2(y), b], 1))
        return self.head(self.merge1(torch.cat([self.up1(y), a], 1)))


class PixelShuffleNet(nn.Module):
    """Superresolution: channels become pixels, twice as many each way (Shi et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.widen, self.shuffle = block(3, 24), nn.Conv2d(24, 32, 3, padding=1), nn.PixelShuffle(2)
        self.refine, self.head = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 3, 2 H, 2 W]."""
        y = F.relu(self.shuffle(self.widen(self.body(x))))
        return self.head(F.relu(self.refine(y)))


class Conv1dNet(nn.Module):
    """A strided, a dilated and a depthwise convolution over time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv1d(4, 16, 5, stride=2, padding=2), nn.BatchNorm1d(16)
        self.wide, self.norm2 = nn.Conv1d(16, 32, 3, dilation=2, padding=2, bias=False), nn.BatchNorm1d(32)
        self.depthwise, self.point = nn.Conv1d(32, 32, 3, padding=1, groups=32), nn.Conv1d(32, 24, 1)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, T] -> [B, CLASSES]."""
        y = F.relu(self.norm2(self.wide(F.relu(self.norm1(self.stem(x))))))
        return self.head(F.gelu(self.point(self.depthwise(y))).mean(2))


class Conv3dNet(nn.Module):
    """A residual block on volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv3d(1, 12, 3, padding=1, bias=False), nn.BatchNorm3d(12)
        self.inner, self.outer = nn.Conv3d(12, 16, 3, padding=1), nn.Conv3d(16, 12, 1)
        self.pool, self.head = nn.MaxPool3d(2), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, D, H, W] -> [B, CLASSES]."""
        x = self.pool(F.relu(self.norm(self.stem(x))))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(x.mean((2, 3, 4)))


class RecurrentNet(nn.Module):
    """Convolutions over time, an LSTM on their outputs, and a hidden layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(4, 16, 3, padding=1), nn.Conv1d(16, 12, 3, padding=1)
        self.lstm = nn.LSTM(12, 20, batch_first=True)
        self.hidden, self.head = nn.Linear(20, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, T] -> [B, CLASSES]."""
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        y, _ = self.lstm(y.transpose(1, 2))
        return self.head(F.relu(self.hidden(y[:, -1])))


class TiedNet(nn.Module):
    """Two layers in a row that share one weight, but not their biases, between two that share nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = block(3, 16), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.second.weight = self.first.weight
        self.last, self.head = nn.Conv2d(16, 24, 3, stride=2), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, CLASSES]."""
        y = F.relu(self.second(F.relu(self.first(self.stem(x)))))
        return self.head(F.relu(self.last(y)).mean((2, 3)))


class ParameterNet(nn.Module):
    """Convolutions called as functions, with weights that are bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 16)
        self.weight, self.bias = nn.Parameter(torch.randn(24, 16, 3, 3) / 12), nn.Parameter(torch.randn(24))
        self.scale = nn.Parameter(torch.randn(24, 1, 1))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, CLASSES]."""
        y = F.conv2d(self.stem(x), self.weight, self.bias, padding=1) * self.scale
        return self.head(F.relu(y).mean((2, 3)))


class WeightNormNet(nn.Module):
    """Weights that are computed from a direction and a length (Salimans and Kingma 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = (weight_norm(nn.Conv1d(i, o, 3, padding=1)) for i, o in ((4, 16), (16, 24)))
        self.conv3, self.head = nn.Conv1d(24, 16, 1), weight_norm(nn.Linear(16, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4, T] -> [B, CLASSES]."""
        y = F.elu(self.conv2(F.elu(self.conv1(x))))
        return self.head(F.elu(self.conv3(y)).mean(2))


class SiameseNet(nn.Module):
    """One encoder for two images; the head sees how their features differ."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 24))
        self.hidden, self.head = nn.Linear(24, 16), nn.Linear(16, CLASSES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two of [B, 3, H, W] -> [B, CLASSES]."""
        y = (self.encoder(a) - self.encoder(b)).abs().mean((2, 3))
        return self.head(F.relu(self.hidden(y)))


class DictNet(nn.Module):
    """Two heads, and their outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 24))
        self.logits, self.boxes = nn.Linear(24, CLASSES), nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] -> logits [B, CLASSES], boxes [B, 4, H / 2, W / 2]."""
        y = self.body(x)
        return {"logits": self.logits(y.mean((2, 3))), "boxes": self.boxes(y)}


class TwoInputsNet(nn.Module):
    """An image and a vector of facts about it, joined before the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(block(3, 16), nn.MaxPool2d(2), block(16, 24))
        self.facts = nn.Sequential(nn.Linear(7, 12), nn.ReLU())
        self.hidden, self.head = nn.Linear(36, 20), nn.Linear(20, CLASSES)

    def forward(self, image: Tensor, facts: Tensor) -> Tensor:
        """[B, 3, H, W] and [B, 7] -> [B, CLASSES]."""
        y = torch.cat([self.image(image).mean((2, 3)), self.facts(facts)], 1)
        return self.head(F.relu(self.hidden(y)))


IMAGE, SERIES = (3, 16, 16), (4, 24)

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "unet": (UNet, (IMAGE,)),
    "pixel_shuffle": (PixelShuffleNet, (IMAGE,)),
    "conv1d": (Conv1dNet, (SERIES,)),
    "conv3d": (Conv3dNet, ((1, 8, 8, 8),)),
    "conv_lstm": (RecurrentNet, (SERIES,)),
    "tied_weights": (TiedNet, (IMAGE,)),
    "bare_parameters": (ParameterNet, (IMAGE,)),
    "weight_norm": (WeightNormNet, (SERIES,)),
    "siamese": (SiameseNet, (IMAGE, IMAGE)),
    "dict_output": (DictNet, (IMAGE,)),
    "two_inputs": (TwoInputsNet, (IMAGE, (7,))),
}
"""Name -> the class, and the shapes of one sample of each input."""
