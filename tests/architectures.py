"""Random small architectures, assembled from stages that hold every operator the graph has a rule for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from networks import randomised
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


class Stage(nn.Module, ABC):
    """From [B, channels, H, W] to [B, ``width``, h, w].

    Args:
        channels: of the input.
        width: how wide the stage is; some put out as many channels as they take, or more.
        act: what stands between its layers.
    """

    def __init__(self, channels: int, width: int, act: Activation) -> None:
        super().__init__()
        self.act, self.width = act, width
        self.build(channels, width)

    @abstractmethod
    def build(self, c: int, w: int) -> None:
        """Makes the layers and says how wide the stage is where that is not ``w``."""


class Conv(Stage):
    def build(self, c: int, w: int) -> None:
        self.conv, self.bn = nn.Conv2d(c, w, 3, padding="same"), nn.BatchNorm2d(w)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout2d(self.act(self.bn(self.conv(x))), 0.2, self.training)


class Residual(Stage):
    def build(self, c: int, w: int) -> None:
        self.bn, self.first = nn.BatchNorm2d(c), nn.Conv2d(c, w, 1)
        self.second, self.width = nn.Conv2d(w, c, 3, padding=1, bias=False), c

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.first(self.bn(x)))).mul_(0.5)


class Project(Stage):
    def build(self, c: int, w: int) -> None:
        self.conv, self.bn = nn.Conv2d(c, w, 3, padding=1, bias=False), nn.BatchNorm2d(w, affine=False)
        self.beside = nn.Conv2d(c, w, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True) + self.beside(x)


class Concat(Stage):
    def build(self, c: int, w: int) -> None:
        self.conv, self.width = nn.Conv2d(c, w, 1), c + w

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.act(self.conv(x))], 1)


class Gate(Stage):
    def build(self, c: int, w: int) -> None:
        self.down, self.up, self.width = nn.Linear(c, w), nn.Linear(w, c), c

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(self.act(self.down(x.mean((2, 3))))))[:, :, None, None]


class Excite(Stage):
    def build(self, c: int, w: int) -> None:
        self.down, self.up, self.width = nn.Conv2d(c, w, 1), nn.Conv2d(w, c, 1), c

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))) * x


class Twice(Stage):
    def build(self, c: int, w: int) -> None:
        self.conv = nn.Conv2d(2 * c, w, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(torch.cat([x, F.relu(-x)], 1)))


class Inverted(Stage):
    """An inverted residual block; every second channel of its depthwise convolution comes from the same neuron."""

    def build(self, c: int, w: int) -> None:
        self.expand, self.bn1 = nn.Conv2d(c, w, 1, bias=False), nn.BatchNorm2d(w)
        self.depthwise = nn.Conv2d(w, 2 * w, 3, padding=1, groups=w, bias=False)
        self.bn2, self.project, self.bn3 = nn.BatchNorm2d(2 * w), nn.Conv2d(2 * w, c, 1), nn.BatchNorm2d(c)
        self.width = c

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.expand(x)))
        return x + self.bn3(self.project(self.act(self.bn2(self.depthwise(y)))))


class Separable(Stage):
    def build(self, c: int, w: int) -> None:
        self.depthwise, self.pointwise = nn.Conv2d(c, c, 3, padding=1, groups=c), nn.Conv2d(c, w, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.pointwise(self.act(self.depthwise(x))))


class Grouped(Stage):
    def build(self, c: int, w: int) -> None:
        self.first, self.bn = nn.Conv2d(c, 2 * w, 1), nn.BatchNorm2d(2 * w)
        self.grouped = nn.Conv2d(2 * w, 4 * w, 3, padding=1, groups=2)
        self.last, self.width = nn.Conv2d(4 * w, c, 1), c

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.act(self.grouped(self.act(self.bn(self.first(x))))))


class Shuffled(Stage):
    def build(self, c: int, w: int) -> None:
        self.lift, self.width = nn.Conv2d(c, 2 * w, 1), 2 * w
        self.first = nn.Conv2d(2 * w, 4 * w, 1, groups=2)
        self.second = nn.Conv2d(4 * w, 2 * w, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(self.act(self.lift(x))))
        y = y.view(y.shape[0], 2, y.shape[1] // 2, *y.shape[2:]).transpose(1, 2).reshape(y.shape)
        return self.act(self.second(y))


class Padded(Stage):
    """A shortcut that drops every second position and adds channels of zeros (ResNet's option A)."""

    def build(self, c: int, w: int) -> None:
        self.conv, self.bn = nn.Conv2d(c, c + w, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c + w)
        self.added, self.width = w, c + w

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return self.act(self.bn(self.conv(x)) + shortcut)


class Pool(Stage):
    def build(self, c: int, w: int) -> None:
        self.kind, self.width = (F.max_pool2d, F.avg_pool2d)[w % 2], c

    def forward(self, x: Tensor) -> Tensor:
        return self.kind(x, 3, 2, 1)


STAGES: dict[str, type[Stage]] = {
    kind.__name__: kind
    for kind in (
        Conv, Residual, Project, Concat, Gate, Excite, Twice, Inverted, Separable, Grouped, Shuffled, Padded, Pool,
    )
}  # fmt: skip
TAILS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "flatten": (lambda x: F.adaptive_max_pool2d(x, 2).flatten(1), 4),
    "mean": (lambda x: x.mean((2, 3)), 1),
    "pool": (lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), 1),
}  # what leads to the linear layers, and columns per channel
ACTIVATIONS: dict[str, Activation] = {
    f.__name__: f for f in (F.relu, F.relu6, F.hardswish, F.silu, F.gelu, F.elu, F.leaky_relu, torch.tanh)
}


class Assembled(nn.Module):
    """A network for images [B, 3, 6, 6] and three classes.

    Args:
        stages: (kind, width) of each.
        tail: how the last stage becomes a vector.
        act: between the layers of a stage.
    """

    def __init__(self, stages: Sequence[tuple[str, int]], tail: str = "mean", act: str = "relu") -> None:
        super().__init__()
        self.stem, self.act, channels = nn.Conv2d(3, 4, 3, padding=1), ACTIVATIONS[act], 4
        self.stages = nn.Sequential()
        for kind, width in stages:
            self.stages.append(STAGES[kind](channels, width, self.act))
            channels = self.stages[-1].width
        self.tail, columns = TAILS[tail]
        self.hidden, self.norm = nn.Linear(channels * columns, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tail(self.stages(F.silu(self.stem(x))))
        return self.head(torch.sigmoid(self.norm(self.hidden(x))))
