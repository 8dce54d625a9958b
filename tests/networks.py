"""Small networks that tests prune, with batch norm statistics that make every mistake visible."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from singe.demo import Block, DigitNet


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives weights, batch norm statistics and affine parameters random values away from their defaults; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (_ConvNd, nn.Linear)):
                fan_in = module.weight[0].numel()
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * fan_in**-0.5)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
            elif isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)):
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.5)
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                if module.weight is not None:
                    module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.5)
    return model.eval()


class PlainNet(nn.Module):
    """VGG-like: convolutions with batch norm, max pooling, dropout, flatten into two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(7, 9, 3, padding="same", bias=False), nn.BatchNorm2d(9, affine=False), nn.ReLU(inplace=True),
            nn.Conv2d(9, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.AvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(6, 11), nn.ReLU(), nn.Dropout(), nn.Linear(11, 4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        return self.classifier(torch.flatten(self.features(x), 1))


class FlattenNet(nn.Module):
    """A convolution whose channels each become four columns of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 1))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden = nn.Linear(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        y = self.pool(F.gelu(self.conv(x)))
        return self.head(torch.tanh(self.norm(self.hidden(y.reshape(len(x), -1)))))


class PreActNet(nn.Module):
    """A residual stream whose batch norms stand before the convolutions and belong to none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 6, 1)
        self.bn3, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        x = self.stem(x)
        y = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(y)))
        return self.head(F.relu(self.bn3(x)).mean((2, 3)))


class MobileNet(nn.Module):
    """Inverted residuals: one with a depthwise bias and two channels each and no batch norm, one with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        self.down = nn.Sequential(
            nn.Conv2d(4, 5, 1), nn.ReLU6(), nn.Conv2d(5, 10, 3, stride=2, padding=1, groups=5), nn.ReLU6(),
            nn.Conv2d(10, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.block = nn.Sequential(
            nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
            nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        x = self.down(self.stem(x))
        return self.head((x + self.block(x)).mean((2, 3)))


class ResNeXt(nn.Module):
    """A residual block around a convolution in three groups, and a channel shuffle between two grouped ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 9, 1), nn.BatchNorm2d(9)
        self.conv2, self.bn2 = nn.Conv2d(9, 6, 3, padding=1, groups=3, bias=False), nn.BatchNorm2d(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.before, self.behind = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 3, groups=2)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y))))))
        x = shuffled(F.relu(self.before(x)), 2)
        return self.head(F.relu(self.behind(x)).mean((2, 3)))


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The channels of [B, C, H, W], one of each group in turn."""
    return x.view(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


class ExciteNet(nn.Module):
    """Squeeze and excitation around depthwise convolutions: one gate by hardsigmoid, one by sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.bn, self.fc1, self.fc2 = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.conv, self.gate = nn.Conv2d(6, 5, 3, stride=2), nn.Linear(5, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        x = F.hardswish(self.bn(self.depthwise(F.hardswish(self.expand(x)))))
        x = x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))), inplace=True)
        x = F.hardswish(self.conv(x))
        return self.head((x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]).amax((2, 3)))


class OptionANet(nn.Module):
    """A shortcut without weights: it drops every second position and adds channels of zeros on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(F.relu(self.last(y)).mean((2, 3)))


class DenseNet(nn.Module):
    """Layers that read all layers before them; dropped channels, adaptive pooling, columns that flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3, padding=1)
        self.norm, self.second = nn.BatchNorm2d(7), nn.Conv2d(7, 3, 3, padding=1, bias=False)
        self.drop, self.pool, self.head = nn.Dropout2d(), nn.AdaptiveMaxPool2d(2), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 8, 8] -> [B, 4]."""
        x = F.silu(self.stem(x))
        x = torch.cat([x, F.gelu(self.first(x))], 1)
        x = self.drop(torch.cat([x, F.gelu(self.second(self.norm(x)))], 1))
        return self.head(self.pool(x).flatten(1))


class MLP(nn.Module):
    """Linear layers on vectors, or on the last axis of sequences."""

    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, 12), activation or nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 10] or [B, T, 10] -> [B, 4]."""
        y = self.layers(x)
        return y if y.dim() == 2 else y.mean(1)


def images(count: int = 5, size: int = 8, channels: int = 3, classes: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A random batch (x [count, channels, size, size], y [count])."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.randint(classes, (count,), generator=generator)


__all__ = [
    "MLP", "Block", "DenseNet", "DigitNet", "ExciteNet", "FlattenNet", "MobileNet", "OptionANet", "PlainNet",
    "PreActNet", "ResNeXt", "images", "randomised", "shuffled",
]  # fmt: skip


class Experts(nn.Module):
    """Each sample goes through one of three experts, as a layer decides; through the last of them none does."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.stem, self.gate = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 10)) for _ in range(3))
        self.head = nn.Linear(10, 4)
        randomised(self)
        with torch.no_grad():
            self.gate.bias += torch.tensor([-0.34, 0, -1e4])

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(self.front(x).relu()).relu()
        chosen, out = self.gate(h).argmax(1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            own = chosen == number
            out[own] = expert(h[own])
        return self.head(out + h)
