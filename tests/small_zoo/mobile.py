"""Networks of depthwise convolutions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .entry import Entry
from .parts import Gate, StochasticDepth, conv_bn


class Inverted(nn.Module):
    """Expansion, depthwise convolution, gate if any, projection; the input is added where the shape stays.

    Args:
        channels: of the input.
        hidden: channels of the depthwise convolution; without expansion where the input has as many.
        width: of the output.
        stride: of the depthwise convolution.
        act: behind the first two.
        gate: of as many channels, or None.
        drop: share of samples that pass by in train mode.
    """

    def __init__(
        self, channels: int, hidden: int, width: int, stride: int, act: Callable[[], nn.Module],
        gate: Callable[[int], nn.Module] | None = None, drop: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = [conv_bn(channels, hidden, 1, act=act)] if hidden != channels else []
        layers.append(conv_bn(hidden, hidden, 3, act=act, stride=stride, groups=hidden))
        if gate is not None:
            layers.append(gate(hidden))
        layers += [nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.block, self.stochastic_depth = nn.Sequential(*layers), StochasticDepth(drop)
        self.use_res_connect = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_res_connect:
            result = self.stochastic_depth(result)
            result += x
        return result


class Mobile(nn.Module):
    """A stem, inverted residuals, a last convolution and a classifier."""

    def __init__(self, blocks: list[nn.Module], act: Callable[[], nn.Module], classifier: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(conv_bn(3, 8, act=act, stride=2), *blocks, conv_bn(10, 14, 1, act=act))
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(1), classifier

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v2() -> nn.Module:
    act = partial(nn.ReLU6, inplace=True)
    blocks = [Inverted(8, 8, 8, 1, act), Inverted(8, 16, 10, 2, act), Inverted(10, 15, 10, 1, act)]
    return Mobile(blocks, act, nn.Sequential(nn.Dropout(0.2), nn.Linear(14, 5)))


def mobilenet_v3() -> nn.Module:
    act, relu = partial(nn.Hardswish, inplace=True), partial(nn.ReLU, inplace=True)
    gate = partial(Gate, hidden=4, act=nn.ReLU, gate=nn.Hardsigmoid)
    blocks = [Inverted(8, 8, 8, 1, relu), Inverted(8, 16, 10, 2, act, gate), Inverted(10, 15, 10, 1, act, gate)]
    classifier = nn.Sequential(
        nn.Linear(14, 12), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True), nn.Linear(12, 5)
    )
    return Mobile(blocks, act, classifier)


def efficientnet() -> nn.Module:
    act = partial(nn.SiLU, inplace=True)
    gate = partial(Gate, hidden=4, act=partial(nn.SiLU, inplace=True), gate=nn.Sigmoid)
    blocks = [
        Inverted(8, 8, 8, 1, act, gate, 0.1), Inverted(8, 16, 10, 2, act, gate), Inverted(10, 15, 10, 1, act, gate, 0.2)
    ]  # fmt: skip
    return Mobile(blocks, act, nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(14, 5)))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Half of the channels pass by, or at stride 2 both branches see all; then the channels change places."""

    def __init__(self, channels: int, width: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, width // 2
        self.branch1 = nn.Sequential()
        if stride > 1:
            self.branch1 = nn.Sequential(
                *conv_bn(channels, channels, 3, stride=2, groups=channels)[:2], *conv_bn(channels, half, 1)
            )
        self.branch2 = nn.Sequential(
            *conv_bn(channels if stride > 1 else half, hidden, 1),
            *conv_bn(hidden, hidden, 3, stride=stride, groups=hidden)[:2], *conv_bn(hidden, half, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv5, self.fc = conv_bn(3, 8, stride=2), conv_bn(16, 14, 1), nn.Linear(14, 5)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 16, 7, 2), ShuffleUnit(16, 16, 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.stage2(self.conv1(x)))
        return self.fc(x.mean([2, 3]))


class GhostModule(nn.Module):
    """A convolution, and a depthwise one that makes the rest of ``width`` channels of its output."""

    def __init__(self, channels: int, width: int, relu: bool) -> None:
        super().__init__()
        self.width, primary = width, -(-width // 2)
        act = partial(nn.ReLU, inplace=True) if relu else nn.Identity
        self.primary_conv = conv_bn(channels, primary, 1, act=act)
        self.cheap_operation = conv_bn(primary, primary, 3, act=act, groups=primary)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        out = torch.cat([x1, self.cheap_operation(x1)], dim=1)
        return out[:, : self.width, :, :]


class GhostNet(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.ghost1, self.ghost2 = GhostModule(8, hidden, True), GhostModule(hidden, 8, False)
        self.last, self.head = conv_bn(8, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.last(x + self.ghost2(self.ghost1(x)))
        return self.head(torch.flatten(x.mean((2, 3), keepdim=True), 1))


_MOBILE = {
    "features.0.0": 8, "features.2.block.0.0": 16, "features.2.block.{}": 10, "features.3.block.0.0": 15,
    "features.4.0": 14,
}  # fmt: skip


def _mobile(projection: int) -> dict[str, int]:
    """The layers of all three, whose projections stand at different places."""
    return {name.format(projection): width for name, width in _MOBILE.items()}


MOBILE = {
    "mobilenet v2": Entry(mobilenet_v2, free=_mobile(2), frozen={"classifier.1": "networkoutput"}),
    "mobilenet v3": Entry(
        mobilenet_v3,
        free={**_mobile(3), "features.2.block.2.fc1": 4, "features.3.block.2.fc1": 4, "classifier.0": 12},
        frozen={"classifier.3": "networkoutput"},
    ),
    "efficientnet": Entry(efficientnet, free={**_mobile(3), "features.1.block.1.fc1": 4, "features.2.block.2.fc1": 4}),
    "shufflenet v2": Entry(
        ShuffleNet,
        # halves and shuffles leave four kinds of places in the stage, which each branch writes two of
        free={
            "conv1.0": 8,
            "stage2.0.branch1.2": 4,
            "stage2.0.branch2.0": 7,
            "stage2.1.branch2.0": 6,
            "conv5.0": 14,
        },
    ),
    "ghostnet": Entry(lambda: GhostNet(12), free={"stem.0": 4, "ghost1.primary_conv.0": 6, "last.0": 12}),
    "ghostnet odd": Entry(lambda: GhostNet(11), free={"stem.0": 4, "last.0": 12}, doubtful=["ghost1.primary_conv.0"]),
}
