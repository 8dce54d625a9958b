"""Networks that answer at every place of an image."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry
from .parts import conv_bn


class Backbone(nn.Module):
    """Features at two depths; the deeper ones keep their size by dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.layer1 = conv_bn(3, 8, stride=2), conv_bn(8, 7, stride=2)
        self.layer2, self.layer3 = conv_bn(7, 9, dilation=2), conv_bn(9, 9, dilation=4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        middle = self.layer1(self.conv1(x))
        x = self.layer2(middle)
        return OrderedDict(out=x + self.layer3(x), aux=middle)


class ImagePooling(nn.Sequential):
    """One vector for the whole image, at every place of it."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_bn(channels, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for module in self:
            x = module(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [conv_bn(channels, width, 1), conv_bn(channels, width, dilation=2), ImagePooling(channels, width)]
        )
        self.project = nn.Sequential(*conv_bn(3 * width, width, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for conv in self.convs:
            results.append(conv(x))
        return self.project(torch.cat(results, dim=1))


class Segmentation(nn.Module):
    """A head behind the last features and, in train mode or always, one behind the middle ones."""

    def __init__(self, classifier: nn.Module, aux_always: bool) -> None:
        super().__init__()
        self.backbone, self.classifier, self.aux_always = Backbone(), classifier, aux_always
        self.aux_classifier = nn.Sequential(*conv_bn(7, 4), nn.Dropout(0.1), nn.Conv2d(4, 5, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size, features = x.shape[-2:], self.backbone(x)
        result = OrderedDict()
        result["out"] = F.interpolate(self.classifier(features["out"]), size=size, mode="bilinear", align_corners=False)
        if self.training or self.aux_always:
            aux = self.aux_classifier(features["aux"])
            result["aux"] = F.interpolate(aux, size=size, mode="bilinear", align_corners=False)
        return result


class HighResolution(nn.Module):
    """HRNet: two resolutions side by side, each of which adds the other, and a head over both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.high, self.low = conv_bn(3, 6, stride=2), conv_bn(6, 4), conv_bn(6, 7, stride=2)
        self.high_block, self.low_block = conv_bn(4, 4), conv_bn(7, 7)
        self.up, self.down = conv_bn(7, 4, 1, act=nn.Identity), conv_bn(4, 7, stride=2, act=nn.Identity)
        self.head = nn.Sequential(*conv_bn(11, 9, 1), nn.Conv2d(9, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        high, low = self.high(x), self.low(x)
        high, low = high + self.high_block(high), low + self.low_block(low)
        height, width = high.shape[-2:]
        up = F.interpolate(self.up(low), size=[height, width], mode="bilinear", align_corners=True)
        fused = [F.relu(high + up), F.relu(self.down(high) + low)]
        fused[1] = F.interpolate(fused[1], size=(height, width), mode="bilinear", align_corners=True)
        return self.head(torch.cat(fused, 1))


class Double(nn.Sequential):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__(*conv_bn(channels, width), *conv_bn(width, width))


class Up(nn.Module):
    """Twice the size by a transposed convolution, then joined with the features of that size."""

    def __init__(self, channels: int, skip: int, width: int) -> None:
        super().__init__()
        self.up, self.conv = nn.ConvTranspose2d(channels, width, 2, stride=2), Double(width + skip, width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        high, wide = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class UNet(nn.Module):
    """For images [B, 3, 18, 18]: the smallest features are one place short when they are enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = Double(3, 6), Double(6, 8), Double(8, 10)
        self.up1, self.up2, self.outc = Up(10, 8, 7), Up(7, 6, 5), nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        return self.outc(self.up2(self.up1(x3, x2), x1))


class SuperResolution(nn.Module):
    """Residual blocks without norms, then every channel from four."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.first, self.second = (nn.Conv2d(c, w, 3, padding=1) for c, w in ((3, 8), (8, 9), (9, 8)))
        self.up, self.shuffle = nn.Conv2d(8, 4 * 6, 3, padding=1), nn.PixelShuffle(2)
        self.tail = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        res = self.second(F.relu(self.first(x), inplace=True)).mul(0.1)
        res += x
        return self.tail(self.shuffle(self.up(res)))


class Detector(nn.Module):
    """A feature pyramid over two levels, one head for both, and answers as nested lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.c3, self.c4 = conv_bn(3, 7, stride=2), conv_bn(7, 9, stride=2)
        self.inner = nn.ModuleList([nn.Conv2d(7, 8, 1), nn.Conv2d(9, 8, 1)])
        self.layer = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)])
        self.head, self.cls = nn.Sequential(nn.Conv2d(6, 10, 3, padding=1), nn.ReLU()), nn.Conv2d(10, 2 * 3, 1)
        self.box = nn.Conv2d(10, 2 * 4, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor] | Tensor]:
        c3 = self.c3(x)
        p4 = self.inner[1](self.c4(c3))
        p3 = self.inner[0](c3) + F.interpolate(p4, size=c3.shape[-2:], mode="nearest")
        scores, boxes = [], []
        for level, layer in zip((p3, p4), self.layer, strict=True):
            hidden = self.head(layer(level))
            N, _, H, W = hidden.shape
            score = self.cls(hidden).view(N, -1, 3, H, W).permute(0, 3, 4, 1, 2)
            scores.append(score.reshape(N, -1, 3))
            boxes.append(self.box(hidden).permute(0, 2, 3, 1).flatten(1, 2))
        return {"scores": torch.cat(scores, dim=1), "boxes": boxes}


def _odd_pictures() -> Tensor:
    return torch.randn(4, 3, 18, 18, generator=torch.Generator().manual_seed(1))


_BACKBONE = {"backbone.conv1.0": 8, "backbone.layer1.0": 7, "backbone.layer2.0": 9}

DENSE_PREDICTION = {
    "deeplab": Entry(
        lambda: Segmentation(nn.Sequential(ASPP(9, 6), *conv_bn(6, 8), nn.Conv2d(8, 5, 1)), aux_always=False),
        free={
            **_BACKBONE, "classifier.0.convs.0.0": 6, "classifier.0.convs.1.0": 6, "classifier.0.convs.2.1": 6,
            "classifier.0.project.0": 6, "classifier.1": 8,
        },
        frozen={"classifier.4": "networkoutput"},
    ),
    "fcn": Entry(
        lambda: Segmentation(nn.Sequential(*conv_bn(9, 6), nn.Dropout(0.1), nn.Conv2d(6, 5, 1)), aux_always=True),
        free={**_BACKBONE, "classifier.0": 6, "aux_classifier.0": 4},
        frozen={"classifier.4": "networkoutput", "aux_classifier.4": "networkoutput"},
    ),
    "hrnet": Entry(
        HighResolution, free={"stem.0": 6, "high.0": 4, "low.0": 7, "head.0": 9}, frozen={"head.3": "networkoutput"}
    ),
    "unet": Entry(
        UNet,
        _odd_pictures,
        free={
            "inc.0": 6, "inc.3": 6, "down1.0": 8, "down1.3": 8, "down2.0": 10, "down2.3": 10, "up1.up": 7,
            "up1.conv.0": 7, "up1.conv.3": 7, "up2.up": 5, "up2.conv.0": 5, "up2.conv.3": 5,
        },
        frozen={"outc": "networkoutput"},
    ),
    "super resolution": Entry(
        SuperResolution, free={"head": 8, "first": 9, "up": 6}, frozen={"tail": "networkoutput"}
    ),
    "detector": Entry(
        Detector,
        free={"c3.0": 7, "c4.0": 9, "inner.1": 8, "layer.0": 6, "head.0": 10},
        frozen={"cls": "networkoutput", "box": "networkoutput"},
    ),
}  # fmt: skip
