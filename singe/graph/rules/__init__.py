"""What each ATen operator does to the owners of its inputs (see owners.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..claims import Claims, StoredTensor
from ..mirrors import tidied
from ..nodes import packet_of
from ..operators import (
    ALONG_AXIS,
    CONSTANTS,
    CONVOLUTIONS,
    IDENTITIES,
    MOVES,
    PADS,
    POOLS,
    REDUCTIONS,
    SPLITS,
    TRANSPOSED,
    VIEWS,
    WRITES,
    aten,
)  # fmt: skip
from ..owners import Owners
from ..trace import Trace, evaluate
from .layers import Layers
from .moves import Moves

# treat their argument as numbers, which owners are not
_BY_VALUE = (aten.view.dtype, aten.repeat_interleave.Tensor)


class Rules(Moves, Layers):
    """Applies the rule of each operator; an operator without one freezes all it touches.

    Args:
        owners: of the activations.
        claims: what they own.
        trace: whose operators are run.
    """

    def __init__(self, owners: Owners, claims: Claims, trace: Trace) -> None:
        super().__init__(owners, claims, trace)
        self._weighted: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), self._convolution),
            aten.linear: self._linear,
            aten.batch_norm: self._batch_norm,
            aten._native_batch_norm_legit_functional: self._batch_norm_in_training,
            aten.instance_norm: self._batch_norm,
        }
        self._weightless: dict[Any, Callable[..., Any]] = {
            **dict.fromkeys(MOVES, self._move),
            **dict.fromkeys(VIEWS, self._view),
            **dict.fromkeys(SPLITS, self._split),
            **dict.fromkeys(PADS, self._pad),
            **dict.fromkeys(WRITES, self._write),
            **dict.fromkeys(IDENTITIES, self._identity),
            **dict.fromkeys(POOLS, self._pool),
            **dict.fromkeys(CONSTANTS, self._constant),
            **dict.fromkeys(REDUCTIONS, self._reduce),
            **dict.fromkeys(ALONG_AXIS, self._along_axis),
            **dict.fromkeys((aten.matmul, aten.bmm, aten.mm), self._matmul),
            aten.scaled_dot_product_attention: self._attention,
            aten.einsum: self._einsum,
            aten.layer_norm: self._layer_norm,
            aten.rms_norm: self._layer_norm,
            aten.group_norm: self._group_norm,
            aten.cat: self._cat,
            aten.stack: self._stack,
            aten.index: self._index,
            aten.channel_shuffle: self._shuffle,
            aten.glu: self._glu,
            aten.prelu: self._prelu,
            aten.cosine_similarity: self._similarity,
            aten.div: self._divide,
            aten.where: self._where,
            aten.grid_sampler: self._sample,
        }

    def apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The owners of the node's output, given its arguments with activations as owners (int64)."""
        return pytree.tree_map_only(Tensor, tidied, self._apply(node, args, kwargs))

    def _apply(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = packet_of(node)
        if packet in self._weighted:
            return self._weighted[packet](node, *args, **kwargs)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule = self._weightless.get(packet) or (self._pointwise if pointwise else None)
        if packet is None:
            rule = _run  # getitem and the like
        if rule is None or node.target in _BY_VALUE:
            return self._unknown(node, *args, **kwargs)
        args, kwargs = pytree.tree_map_only(StoredTensor, self._claims.elements, (args, kwargs))
        return rule(node, *args, **kwargs)


def _run(node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """The operator itself."""
    return evaluate(node, args, kwargs)
