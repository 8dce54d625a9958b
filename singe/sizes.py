"""How large networks are: parameters, multiply-adds, the widths of layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from .graph.trace import Forward, answer, plain
from .models.batches import length


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: Any, forward: Forward = plain) -> int:
    """Multiply-adds of ``forward(model, inputs)`` for one sample: torch's flop count over two, in the model's mode."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), warnings.catch_warnings(), _attention_in_parts(), counter:
        # the counter hooks all modules, which compiled ones warn about
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)`", UserWarning)
        answer(model, inputs, forward)
    return counter.get_total_flops() // 2 // length(inputs)


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Attention out of operators that the flop counter knows; it counts nothing for most fused ones."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def widths(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every convolution and linear layer of a network -> its output channels before and after pruning."""
    now = dict(after.named_modules())
    layers = [(name, m) for name, m in before.named_modules() if isinstance(m, (nn.Linear, _ConvNd)) and name in now]
    return {name: (_width(layer), _width(now[name])) for name, layer in layers}


def _width(layer: nn.Module) -> int:
    width: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[assignment]
    return width
