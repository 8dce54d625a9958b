"""How large networks are: parameters, multiply-adds, the widths of layers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .graph.trace import Forward, answer, plain_call
from .models.batches import length
from .models.isolation import none_trained

Shape = Sequence[int]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: Any, forward: Forward = plain_call) -> int:
    """Multiply-adds of ``forward(model, inputs)`` for one sample: torch's flop count over two, in the model's mode."""
    if any(p.is_meta for p in model.parameters()):
        inputs = pytree.tree_map(lambda t: t.to("meta"), inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    # the counter asks views of parameters that require gradients for functions that no_grad does not give them
    with torch.no_grad(), none_trained(model), warnings.catch_warnings(), _attention_in_parts(), counter:
        # the counter hooks all modules, which compiled ones warn about
        warnings.filterwarnings("ignore", r"Using `torch\.compile\(module\)`", UserWarning)
        answer(model, inputs, forward)
    return counter.get_total_flops() // 2 // length(inputs)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


_FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Fused operators that torch's counter does not know."""


@contextlib.contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Has torch's attention layers run as the operators that they consist of, and without nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def widths(before: nn.Module, after: nn.Module) -> dict[str, tuple[int, int]]:
    """Name of every convolution and linear layer of a network -> its output channels before and after pruning."""
    now = dict(after.named_modules())
    layers = [(name, m) for name, m in before.named_modules() if isinstance(m, (nn.Linear, _ConvNd)) and name in now]
    return {name: (_width(layer), _width(now[name])) for name, layer in layers}


def _width(layer: nn.Module) -> int:
    width: int = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels  # type: ignore[assignment]
    return width
