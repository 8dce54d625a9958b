"""Vision transformers, by how they write attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Entry
from .parts import Mlp, conv_bn


class ModuleBlock(nn.Module):
    """Attention by ``torch.nn.MultiheadAttention``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention, self.dropout = nn.MultiheadAttention(width, 2, batch_first=True), nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 12), nn.GELU(), nn.Dropout(0.1), nn.Linear(12, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class FusedAttention(nn.Module):
    """One linear layer for queries, keys and values; the number of heads and their width are attributes."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj, self.proj_drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.1)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        x = x.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(x))


class SeparateAttention(nn.Module):
    """Linear layers of their own for queries, keys and values; products and softmax written out."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = torch.matmul(q, k.transpose(-2, -1)) / self.head_dim**0.5
        x = torch.matmul(scores.softmax(dim=-1), v).transpose(1, 2).contiguous()
        return self.proj(x.view(batch, tokens, self.num_heads * self.head_dim))


class ShapeAttention(nn.Module):
    """The width of a head is the width of the stream over the number of heads."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and before a scale [C]."""

    def __init__(self, width: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(width), attention, nn.Parameter(torch.rand(width))
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(width), Mlp(width, hidden), nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)).mul_(self.ls2)


class ViT(nn.Module):
    """Patches, a class token and position embeddings, blocks; the class token answers."""

    def __init__(self, width: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.conv_proj, self.width = nn.Conv2d(3, width, 4, stride=4), width
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.randn(1, 17, width))
        self.dropout, self.blocks = nn.Dropout(0.1), nn.Sequential(*blocks)
        self.ln, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        x = self.conv_proj(x).reshape(n, self.width, (h // 4) * (w // 4)).permute(0, 2, 1)
        x = torch.cat([self.class_token.expand(n, -1, -1), x], dim=1)
        x = self.ln(self.blocks(self.dropout(x + self.pos_embedding)))
        return self.head(x[:, 0])


def relative_positions(size: int) -> Tensor:
    """int64 [size², size²]: which of (2 size - 1)² offsets lies between two places of a window."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    places = torch.stack([y, x]).flatten(1)
    offset = (places[:, :, None] - places[:, None, :]) + size - 1
    return offset[0] * (2 * size - 1) + offset[1]


class WindowAttention(nn.Module):
    """Attention within windows that may be shifted, with a bias for every offset within a window."""

    def __init__(self, width: int, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.window, self.shift = num_heads, window, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_positions(window).flatten())

    def bias(self) -> Tensor:
        places = self.window**2
        bias = self.relative_position_bias_table[self.relative_position_index]
        return bias.view(places, places, -1).permute(2, 0, 1).contiguous().unsqueeze(0)

    def mask(self, x: Tensor, height: int, width: int) -> Tensor:
        """[windows, places, places]: minus a hundred between parts of a window that the shift brought together."""
        size, shift = self.window, self.shift
        parts = x.new_zeros((height, width))
        edges = ((0, -size), (-size, -shift), (-shift, None))
        for i, (top, bottom) in enumerate(edges):
            for j, (left, right) in enumerate(edges):
                parts[top:bottom, left:right] = 3 * i + j
        parts = parts.view(height // size, size, width // size, size).permute(0, 2, 1, 3).reshape(-1, size * size)
        apart = parts.unsqueeze(1) - parts.unsqueeze(2)
        return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        size = self.window
        x = F.pad(x, (0, 0, 0, (size - W % size) % size, 0, (size - H % size) % size))
        _, height, width, _ = x.shape
        if self.shift:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = (height // size) * (width // size)
        x = x.view(B, height // size, size, width // size, size, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B * windows, size * size, C)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        qkv = qkv.reshape(x.size(0), x.size(1), 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q = q * (C // self.num_heads) ** -0.5
        attn = q.matmul(k.transpose(-2, -1)) + self.bias()
        if self.shift:
            mask = self.mask(x, height, width)
            attn = attn.view(x.size(0) // windows, windows, self.num_heads, x.size(1), x.size(1))
            attn = attn + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, x.size(1), x.size(1))
        attn = F.dropout(F.softmax(attn, dim=-1), 0.1, training=self.training)
        x = attn.matmul(v).transpose(1, 2).reshape(x.size(0), x.size(1), C)
        x = F.linear(x, self.proj.weight, self.proj.bias)
        x = x.view(B, height // size, width // size, size, size, C)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, height, width, C)
        if self.shift:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        return x[:, :H, :W, :].contiguous()


class PatchMerging(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * width, 2 * width, bias=False), nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        quarters = [x[..., i::2, j::2, :] for j in range(2) for i in range(2)]
        return self.reduction(self.norm(torch.cat(quarters, -1)))


class SwinBlock(nn.Module):
    def __init__(self, width: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), WindowAttention(width, 2, window, shift)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm0 = nn.Conv2d(3, 4, 2, stride=2), nn.LayerNorm(4)
        self.features = nn.Sequential(SwinBlock(4, 4, 0), PatchMerging(4), SwinBlock(8, 2, 1))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patches(x).permute(0, 2, 3, 1))
        x = self.norm(self.features(x)).permute(0, 3, 1, 2)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PartitionAttention(nn.Module):
    """MaxViT's attention within windows, or between the same places of all windows."""

    def __init__(self, width: int, head_dim: int, window: int, grid: bool) -> None:
        super().__init__()
        self.n_heads, self.head_dim, self.window, self.grid = width // head_dim, head_dim, window, grid
        self.norm, self.to_qkv, self.merge = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, self.n_heads))
        self.register_buffer("relative_position_index", relative_positions(window))
        self.mlp_norm, self.mlp = nn.LayerNorm(width), Mlp(width, 2 * width)

    def attend(self, x: Tensor) -> Tensor:
        B, G, P, D = x.shape
        q, k, v = torch.chunk(self.to_qkv(x), 3, dim=-1)
        q = q.reshape(B, G, P, self.n_heads, self.head_dim).permute(0, 1, 3, 2, 4)
        k = k.reshape(B, G, P, self.n_heads, self.head_dim).permute(0, 1, 3, 2, 4) * self.head_dim**-0.5
        v = v.reshape(B, G, P, self.n_heads, self.head_dim).permute(0, 1, 3, 2, 4)
        scores = torch.einsum("B G H I D, B G H J D -> B G H I J", q, k)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = F.softmax(scores + bias.view(P, P, -1).permute(2, 0, 1).contiguous().unsqueeze(0), dim=-1)
        out = torch.einsum("B G H I J, B G H J D -> B G H I D", scores, v)
        return self.merge(out.permute(0, 1, 3, 2, 4).reshape(B, G, P, D))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        P = self.window
        x = x.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(B, (H // P) * (W // P), P * P, C)
        if self.grid:
            x = torch.swapaxes(x, -2, -3)
        x = x + self.attend(self.norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        if self.grid:
            x = torch.swapaxes(x, -2, -3)
        x = x.reshape(B, H // P, W // P, P, P, C).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(B, C, H, W)


class MaxViT(nn.Module):
    """A residual block of convolutions, attention in windows, attention on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8, stride=2)
        self.pre_norm, self.conv_a = nn.BatchNorm2d(8), conv_bn(8, 12, 1, act=nn.GELU)
        self.conv_b, self.conv_c = conv_bn(12, 12, 3, act=nn.GELU, stride=2, groups=12), nn.Conv2d(12, 8, 1)
        self.window = PartitionAttention(8, 4, 2, grid=False)
        self.across = PartitionAttention(8, 4, 2, grid=True)
        self.proj = nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(8, 8, 1))
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 9), nn.Tanh(),
            nn.Linear(9, 5, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.proj(x) + self.conv_c(self.conv_b(self.conv_a(self.pre_norm(x))))
        # the grid has as many windows as a window has places
        return self.head(self.across(self.window(x)))


class MobileViT(nn.Module):
    """Tokens are the same places of all patches; batch and places share an axis."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch, self.patch_area = 2, 4
        self.stem, self.conv_kxk = conv_bn(3, 6, act=nn.SiLU, stride=2), conv_bn(6, 7, act=nn.SiLU)
        self.conv_1x1 = nn.Conv2d(7, width, 1, bias=False)
        self.transformer = nn.Sequential(Block(width, FusedAttention(width, 2), 10))
        self.norm, self.conv_proj = nn.LayerNorm(width), conv_bn(width, 6, 1, act=nn.SiLU)
        self.conv_fusion, self.head = conv_bn(12, 9, act=nn.SiLU), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x = self.stem(x)
        x = self.conv_1x1(self.conv_kxk(x))
        B, C, H, W = x.shape
        rows, columns = H // self.patch, W // self.patch
        patches = rows * columns
        x = x.reshape(B * C * rows, self.patch, columns, self.patch).transpose(1, 2)
        x = x.reshape(B, C, patches, self.patch_area).transpose(1, 3).reshape(B * self.patch_area, patches, -1)
        x = self.norm(self.transformer(x))
        x = x.contiguous().view(B, self.patch_area, patches, -1)
        x = x.transpose(1, 3).reshape(B * C * rows, columns, self.patch, self.patch)
        x = x.transpose(1, 2).reshape(B, C, H, W)
        x = self.conv_fusion(torch.cat((shortcut, self.conv_proj(x)), dim=1))
        return self.head(x.mean((2, 3)))


ATTENTION = {
    "vit module": Entry(
        lambda: ViT(8, ModuleBlock(8)),
        free={"blocks.0.mlp.0": 12},
        frozen={"conv_proj": "layernorm", "blocks.0.self_attention": "", "head": "networkoutput"},
    ),
    "vit fused": Entry(
        lambda: ViT(8, Block(8, FusedAttention(8, 4), 12)),
        free={"blocks.0.attn.qkv": 4, "blocks.0.mlp.fc1": 12}, frozen={"conv_proj": "layernorm"},
    ),
    "vit separate": Entry(
        lambda: ViT(8, Block(8, SeparateAttention(8, 4), 12)),
        free={"blocks.0.attn.q": 4, "blocks.0.mlp.fc1": 12}, frozen={"conv_proj": "layernorm"},
    ),
    "vit by shape": Entry(
        lambda: ViT(8, Block(8, ShapeAttention(8, 4), 12)),
        free={"blocks.0.mlp.fc1": 12}, frozen={"conv_proj": "layernorm", "blocks.0.attn.qkv": ""},
    ),
    "swin": Entry(
        Swin,
        free={"features.0.mlp.fc1": 8, "features.2.mlp.fc1": 16},
        frozen={
            "patches": "layernorm", "features.1.reduction": "layernorm", "features.0.attn.qkv": "",
            "features.2.attn.qkv": "",
        },
    ),
    "maxvit": Entry(
        MaxViT,
        free={
            "stem.0": 8, "conv_a.0": 12, "window.mlp.fc1": 16, "across.mlp.fc1": 16, "head.3": 9,
        },
        frozen={"proj.1": "layernorm", "window.to_qkv": "", "across.to_qkv": ""},
    ),
    "mobilevit": Entry(
        MobileViT,
        free={
            "stem.0": 6, "conv_kxk.0": 7, "transformer.0.attn.qkv": 2, "transformer.0.mlp.fc1": 10, "conv_proj.0": 6,
            "conv_fusion.0": 9,
        },
        frozen={"conv_1x1": "layernorm"},
    ),
}  # fmt: skip
