"""Convolutional networks with the blocks of transformers."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .entry import Entry
from .parts import LayerNorm2d, Mlp, Permute, StochasticDepth


class FirstNextBlock(nn.Module):
    """ConvNeXt's block as a sequence of modules, with a scale [C, 1, 1] behind it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width), Permute(0, 2, 3, 1), nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), Permute(0, 3, 1, 2),
        )  # fmt: skip
        self.layer_scale, self.stochastic_depth = nn.Parameter(torch.rand(width, 1, 1)), StochasticDepth(0.1)

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer_scale * self.block(x)
        result = self.stochastic_depth(result)
        result += x
        return result


class LastNextBlock(nn.Module):
    """ConvNeXt's block with a scale [C], applied before or after the channels move back to the second axis."""

    def __init__(self, width: int, channels_last: bool) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width, 4 * width)
        self.gamma, self.channels_last = nn.Parameter(torch.rand(width)), channels_last

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        if self.channels_last:
            x = (self.gamma * x).permute(0, 3, 1, 2)
        else:
            x = x.permute(0, 3, 1, 2).mul(self.gamma.reshape(1, -1, 1, 1))
        return x + shortcut


class ConvNeXt(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        first, last = blocks
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), LayerNorm2d(6))
        self.stages = nn.Sequential(first, LayerNorm2d(6), nn.Conv2d(6, 8, 2, stride=2), last)
        head = OrderedDict(norm=LayerNorm2d(8), flatten=nn.Flatten(1), drop=nn.Dropout(0.1), fc=nn.Linear(8, 5))
        self.avgpool, self.head = nn.AdaptiveAvgPool2d(1), nn.Sequential(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.avgpool(self.stages(self.stem(x))))


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class ConvMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, width, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PoolBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.token_mixer = nn.GroupNorm(1, width), Pooling()
        self.norm2, self.mlp = nn.GroupNorm(1, width), ConvMlp(width, 2 * width)
        self.layer_scale_1, self.layer_scale_2 = (nn.Parameter(torch.rand(width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1.unsqueeze(-1).unsqueeze(-1) * self.token_mixer(self.norm1(x))
        return x + self.layer_scale_2.unsqueeze(-1).unsqueeze(-1) * self.mlp(self.norm2(x))


class PoolFormer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.network = nn.Conv2d(3, 8, 7, stride=4, padding=2), nn.Sequential(PoolBlock(8))
        self.norm, self.head = nn.GroupNorm(1, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.network(self.patch_embed(x)))
        return self.head(x.mean([-2, -1]))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(width), Mlp(tokens, 6)
        self.norm2, self.mlp_channels = nn.LayerNorm(width), Mlp(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 4, stride=4), nn.Sequential(MixerBlock(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.norm(self.blocks(x))
        return self.head(x.mean(dim=1))


class ScaledBlock(nn.Module):
    """A residual block with a scale for every channel of its branch, and batch norm in place of a layer norm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.BatchNorm2d(width), ConvMlp(width, hidden)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x)) * self.gamma.view(1, -1, 1, 1)


class ScaledNet(nn.Module):
    """Scales [C, 1, 1] and shifts [1, C, 1, 1] that are bare parameters, and a layer scale before a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 7, 3, stride=2, bias=False), nn.Parameter(torch.rand(7, 1, 1))
        self.shift, self.stem = nn.Parameter(torch.randn(1, 7, 1, 1)), nn.Conv2d(7, 8, 1)
        self.block, self.head = ScaledBlock(8, 9), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.conv(x) * self.scale + self.shift).relu()
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class TokenNet(nn.Module):
    """A class token and position embeddings on a stream of tokens that no norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mlp, self.head = nn.Conv2d(3, 8, 4, stride=4), Mlp(8, 10), nn.Linear(8, 5)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        x = x + self.mlp(x)
        return self.head(x[:, 0] + x.mean(1))


_NEXT_STREAMS = {"stem.0": "layernorm", "stages.2": "layernorm", "head.fc": "networkoutput"}

MODERN = {
    "convnext": Entry(
        lambda: ConvNeXt(FirstNextBlock(6), FirstNextBlock(8)),
        free={"stages.0.block.3": 24, "stages.3.block.3": 32}, frozen=_NEXT_STREAMS,
    ),
    "convnext gamma": Entry(
        lambda: ConvNeXt(LastNextBlock(6, True), LastNextBlock(8, False)),
        free={"stages.0.mlp.fc1": 24, "stages.3.mlp.fc1": 32}, frozen=_NEXT_STREAMS,
    ),
    "poolformer": Entry(PoolFormer, free={"network.0.mlp.fc1": 16}, frozen={"patch_embed": "groupnorm"}),
    "mlp-mixer": Entry(
        Mixer, free={"blocks.0.mlp_tokens.fc1": 6, "blocks.0.mlp_channels.fc1": 10}, frozen={"stem": "layernorm"}
    ),
    "scaled channels": Entry(ScaledNet, free={"conv": 7, "stem": 8, "block.mlp.fc1": 9}),
    "tokens": Entry(TokenNet, free={"patches": 8, "mlp.fc1": 10}, frozen={"head": "networkoutput"}),
}  # fmt: skip
