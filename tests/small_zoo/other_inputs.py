"""Networks for sounds, volumes, sequences and several inputs."""

from __future__ import annotations

from typing import Any

import torch
from networks import images
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry
from .parts import conv_bn


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Factored(nn.Sequential):
    """A convolution in space, then one in time."""

    def __init__(self, channels: int, hidden: int, width: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv3d(channels, hidden, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
            nn.BatchNorm3d(hidden), nn.ReLU(inplace=True),
            nn.Conv3d(hidden, width, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        )  # fmt: skip


class VideoBlock(nn.Module):
    def __init__(self, channels: int, hidden: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(Factored(channels, hidden, width, 2), nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.conv2, self.relu = (
            nn.Sequential(Factored(width, hidden, width), nn.BatchNorm3d(width)),
            nn.ReLU(inplace=True),
        )
        self.downsample = nn.Sequential(nn.Conv3d(channels, width, 1, 2, bias=False), nn.BatchNorm3d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += self.downsample(x)
        return self.relu(out)


class Video(nn.Module):
    """R(2+1)D for clips [B, 3, 4, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Factored(3, 5, 6), nn.BatchNorm3d(6), nn.ReLU(inplace=True))
        self.block, self.avgpool, self.fc = VideoBlock(6, 7, 8), nn.AdaptiveAvgPool3d((1, 1, 1)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.block(self.stem(x))).flatten(1))


class Volume(nn.Sequential):
    """For volumes [B, 2, 8, 8, 8]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(6, 8, 3, stride=2, padding=1), nn.LeakyReLU(0.1), nn.Dropout3d(0.1), nn.Flatten(),
            nn.Linear(8 * 8, 10), nn.ReLU(), nn.Linear(10, 5),
        )  # fmt: skip


class Demucs(nn.Module):
    """Sounds [B, 1, T] to sounds: strided convolutions and gated linear units down, transposed ones up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        for channels, width in ((1, 6), (6, 8)):
            self.encoder.append(
                nn.Sequential(
                    nn.Conv1d(channels, width, 8, 4), nn.ReLU(), nn.Conv1d(width, 2 * width, 1), nn.GLU(dim=1)
                )
            )
        for width, channels in ((8, 6), (6, 1)):
            decode = [nn.Conv1d(width, 9, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(9, channels, 8, 4)]
            self.decoder.append(nn.Sequential(*decode, *[nn.ReLU()] * (channels > 1)))

    def forward(self, x: Tensor) -> Tensor:
        saved = []
        for encode in self.encoder:
            x = encode(x)
            saved.append(x)
        for decode in self.decoder:
            skip = saved.pop(-1)
            x = decode(x + skip[..., : x.shape[-1]])
        return x


class Sound(nn.Module):
    """Sounds [B, 1, T] to classes by dilated convolutions whose padding lies in the past."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(c, 7, 3, dilation=d, bias=False) for c, d in ((1, 1), (7, 2), (7, 4)))
        self.norms, self.head = nn.ModuleList(nn.BatchNorm1d(7) for _ in range(3)), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = norm(conv(F.pad(x, (2 * conv.dilation[0], 0)))).relu()
            x = x + y if x.shape[1] == y.shape[1] else y
        return self.head(F.max_pool1d(x, 4).mean(-1))


class Recurrent(nn.Module):
    """A recurrent layer that reads the columns of an image as a sequence."""

    def __init__(self, layer: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cnn = nn.Sequential(*conv_bn(3, 6, stride=2), *conv_bn(6, 8))
        self.rnn, self.hidden, self.head = (
            layer(8, 6, batch_first=True, bidirectional=True),
            nn.Linear(12, 7),
            nn.Linear(7, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x).mean(2).permute(0, 2, 1)
        x, _ = self.rnn(x)
        return self.head(F.relu(self.hidden(x[:, -1, :])))


class Siamese(nn.Module):
    """One tower for two images; the answer depends on how far apart they end up."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(*conv_bn(3, 6, stride=2), *conv_bn(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embed, self.head = nn.Linear(8, 9), nn.Linear(9, 2)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = (torch.tanh(self.embed(self.tower(x))) for x in (left, right))
        return self.head(torch.abs(a - b)), F.cosine_similarity(a, b)


class Metadata(nn.Module):
    """An image and a vector that gates it and is joined to it before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.meta = nn.Sequential(*conv_bn(3, 8, stride=2)), nn.Sequential(nn.Linear(5, 6), nn.ReLU())
        self.gate, self.hidden, self.head = nn.Linear(6, 8), nn.Linear(14, 9), nn.Linear(9, 3)
        self.side = nn.Linear(6, 2)

    def forward(self, image: Tensor, meta: Tensor) -> dict[str, Any]:
        image, meta = self.image(image), self.meta(meta)
        image = image * self.gate(meta).sigmoid().unsqueeze(-1).unsqueeze(-1)
        hidden = F.relu(self.hidden(torch.cat([image.amax((2, 3)), meta], dim=1)))
        return {"logits": self.head(hidden), "side": (self.side(meta), [meta.shape[0]])}


def _pair() -> dict[str, Tensor]:
    return {"left": images(4, 16)[0], "right": images(4, 16, seed=2)[0]}


OTHER_INPUTS = {
    "r(2+1)d": Entry(
        Video,
        lambda: random(4, 3, 4, 8, 8),
        free={
            "stem.0.0": 5, "stem.0.3": 6, "block.conv1.0.0": 7, "block.conv1.0.3": 8, "block.conv2.0.0": 7,
            "block.conv2.0.3": 8,
        },
        frozen={"fc": "networkoutput"},
    ),
    "volume": Entry(
        Volume, lambda: random(4, 2, 8, 8, 8), free={"0": 6, "4": 8, "8": 10}, frozen={"10": "networkoutput"}
    ),
    "demucs": Entry(
        Demucs,
        lambda: random(4, 1, 84),
        free={"encoder.0.0": 6, "encoder.1.0": 8, "decoder.0.0": 9, "decoder.1.0": 9},
        frozen={"decoder.1.2": "networkoutput"},
    ),
    "sound": Entry(Sound, lambda: random(4, 1, 40), free={"convs.0": 7}, frozen={"head": "networkoutput"}),
    "lstm": Entry(
        lambda: Recurrent(nn.LSTM), free={"cnn.0": 6, "hidden": 7}, frozen={"cnn.3": "lstm", "rnn": "lstm"}
    ),
    "gru": Entry(
        lambda: Recurrent(nn.GRU), free={"cnn.0": 6, "hidden": 7}, frozen={"cnn.3": "gru", "rnn": "gru"}
    ),
    "siamese": Entry(
        Siamese,
        _pair,
        lambda model, batch: model(batch["left"], batch["right"]),
        free={"tower.0": 6, "tower.3": 8},
        frozen={"head": "networkoutput"},
    ),
    "metadata": Entry(
        Metadata,
        lambda: {"image": images(4, 16)[0], "meta": random(4, 5)},
        lambda model, batch: model(**batch),
        free={"image.0": 8, "meta.0": 6, "hidden": 9},
        frozen={"head": "networkoutput", "side": "networkoutput"},
    ),
}  # fmt: skip
