"""How large networks are: parameters, multiply-adds, the widths of layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .graph.trace import Forward, answer, plain
from .models.batches import length

Shape = Sequence[int]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: Any, forward: Forward = plain) -> int:
    """Multiply-adds of ``forward(model, inputs)`` for one sample: torch's flop count over two, in the model's mode."""
    if any(p.is_meta for p in model.parameters()):
        inputs = pytree.tree_map(lambda t: t.to("meta"), inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    with torch.no_grad(), warnings.catch_warnings(), counter:
        # the counter hooks all modules, which compiled ones warn about
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)`", UserWarning)
        answer(model, inputs, forward)
    return counter.get_total_flops() // 2 // length(inputs)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _self_attention(tokens: Shape, width: int) -> int:
    """With the linear layers before and after it."""
    batch, count, own = tokens
    return 2 * batch * count * (4 * own * width + 2 * count * width)


def _multi_head(query: Shape, key: Shape, value: Shape, width: int, *_: Any, **__: Any) -> int:
    return _self_attention(query, width)


def _encoder_layer(tokens: Shape, width: int, *rest: Any, **_: Any) -> int:
    hidden = rest[12][0]  # of the first weight of the MLP
    return _self_attention(tokens, width) + 2 * 2 * tokens[0] * tokens[1] * width * hidden


_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._native_multi_head_attention: _multi_head,
    torch.ops.aten._transformer_encoder_layer_fwd: _encoder_layer,
}
"""Fused operators that torch's counter does not know."""


def widths(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every convolution and linear layer of a network -> its output channels before and after pruning."""
    now = dict(after.named_modules())
    layers = [(name, m) for name, m in before.named_modules() if isinstance(m, (nn.Linear, _ConvNd)) and name in now]
    return {name: (_width(layer), _width(now[name])) for name, layer in layers}


def _width(layer: nn.Module) -> int:
    width: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[assignment]
    return width
