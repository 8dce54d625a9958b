"""Networks whose weights or norms are out of the ordinary."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from .entry import Entry
from .parts import conv_bn


class Tied(nn.Module):
    """Two layers with biases of their own share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv_bn(3, 6, stride=2), conv_bn(6, 6, stride=2)
        self.fine, self.coarse = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 1)
        self.coarse.weight = self.fine.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        fine, coarse = self.fine(x).relu(), self.coarse(self.down(x)).relu()
        return self.head(fine.mean((2, 3)) + coarse.amax((2, 3)))


class AutoEncoder(nn.Module):
    """Vectors [B, 12] to vectors; the decoder uses the encoder's weights transposed, a classifier has its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 9), nn.Linear(9, 6)
        self.bias, self.classifier = (
            nn.Parameter(torch.randn(12)),
            nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3)),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.second(torch.relu(self.first(x)))
        hidden = torch.relu(F.linear(code, self.second.weight.T))
        return F.linear(hidden, self.first.weight.t(), self.bias), code, self.classifier(code)


class BareKernel(nn.Module):
    """A convolution and a linear layer whose weights are the model's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Parameter(torch.randn(8))
        self.matrix, self.head = nn.Parameter(torch.randn(9, 8) / 3), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.shift, stride=2, padding=1))
        x = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.matrix)
        return self.head(F.softplus(x))


class Parametrised(nn.Module):
    """The weight of the middle convolution is computed from its parameters."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.stem, self.before, self.middle = conv_bn(3, 6, stride=2), nn.Conv2d(6, 7, 3, padding=1), middle
        self.behind, self.hidden, self.head = nn.Conv2d(8, 9, 1), nn.Linear(9, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.middle(F.elu(self.before(self.stem(x)))), 0.2)
        return self.head(F.elu(self.hidden(F.relu(self.behind(x)).mean((2, 3)))))


class Normed(nn.Module):
    """Convolutions with some norm between them and an MLP behind."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), first
        self.conv2, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), second
        self.mlp, self.head = nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.head(self.mlp(x.mean((2, 3))))


class FrozenNorm(nn.Module):
    """A batch norm of buffers, as detectors have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


class Normalised(nn.Module):
    """Normalises its inputs by buffers, and adds a buffer to channels further on."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.conv, self.stem, self.head = nn.Conv2d(3, 7, 3, stride=2), conv_bn(7, 6), nn.Linear(6, 5)
        self.register_buffer("offset", torch.randn(7, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        return self.head(self.stem(torch.relu(self.conv(x) + self.offset)).mean((2, 3)))


_AROUND = {"stem.0": 6, "behind": 9, "hidden": 10}

WEIGHTS = {
    "tied": Entry(Tied, free={"stem.0": 6, "fine": 8}, frozen={"head": "networkoutput"}),
    "autoencoder": Entry(
        AutoEncoder, lambda: torch.randn(4, 12, generator=torch.Generator().manual_seed(1)),
        free={"classifier.0": 7}, frozen={"second": "", "classifier.2": "networkoutput"},
    ),
    "bare kernel": Entry(BareKernel, free={"kernel": 8, "matrix": 9}, frozen={"head": "networkoutput"}),
    "weight norm": Entry(
        lambda: Parametrised(weight_norm(nn.Conv2d(7, 8, 3, padding=1))), free={**_AROUND, "before": 7, "middle": 8}
    ),
    "spectral norm": Entry(
        lambda: Parametrised(spectral_norm(nn.Conv2d(7, 8, 3, padding=1))),
        free=_AROUND,
        frozen={"before": "computed", "middle": ""},
    ),
    "group norm": Entry(
        lambda: Normed(nn.GroupNorm(2, 8), nn.GroupNorm(6, 6)), free={"conv1": 2, "conv2": 6, "mlp.0": 9}
    ),
    "group norm of all or without weights": Entry(
        lambda: Normed(nn.GroupNorm(1, 8), nn.GroupNorm(3, 6, affine=False)),
        free={"conv2": 3, "mlp.0": 9}, frozen={"conv1": "groupnorm"},
    ),
    "instance norm": Entry(
        lambda: Normed(nn.InstanceNorm2d(8, affine=True), nn.InstanceNorm2d(6)), free={"mlp.0": 9}
    ),
    "prelu": Entry(
        lambda: Normed(nn.PReLU(8), nn.Sequential(nn.BatchNorm2d(6), nn.PReLU(6))),
        free={"conv1": 8, "conv2": 6, "mlp.0": 9},
    ),
    "frozen norm": Entry(lambda: Normed(FrozenNorm(8), FrozenNorm(6)), free={"mlp.0": 9}),
    "normalised": Entry(Normalised, free={"conv": 7, "stem.0": 6}),
}  # fmt: skip
