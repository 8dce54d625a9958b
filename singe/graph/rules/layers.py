"""Operators with weights: layers, which read neurons and write others, and norms, which ride along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..claims import StoredTensor
from ..groups import qualified
from ..mirrors import NOBODY, along, varies
from ..nodes import ancestors, described, packet_of, place_of
from ..operators import TRANSPOSED, aten
from .combinations import Combinations


class Layers(Combinations):
    """Convolutions, linear layers and norms."""

    def _layer_norm(self, node: fx.Node, x: Tensor, shape: list[int], *args: Any, **kwargs: Any) -> Tensor:
        """Statistics over channels would change with them; over positions alone they do not."""
        over = range(x.dim() - len(shape), x.dim())
        if any(varies(x, axis) for axis in over):
            self._owners.freeze(x, f"normalised across channels by {described(node)}")
        for values in (a for a in args[:2] if isinstance(a, Tensor)):
            x = self._combine(node, x, values, None)
        return x

    def _group_norm(self, node: fx.Node, x: Tensor, groups: int, *args: Any) -> Tensor:
        """Channels that share statistics are removed together, but never all of them."""
        channels = self._owners.channels(x, 1)
        if groups == 1:
            self._owners.freeze(channels, f"normalised across channels by {described(node)}")
        else:
            self._note_widths(node, self._owners.unite_along(channels.view(groups, -1), [1]), channels)
        for values in (a for a in args[:2] if isinstance(a, Tensor)):
            self._per_channel(x, values)
        return x

    def _batch_norm(self, node: fx.Node, x: Any, *args: Any) -> Any:
        if not isinstance(x, Tensor):
            return self._unknown(node, x, *args)
        channels = self._owners.channels(x, 1)
        self._note_widths(node, channels)
        sources: Any = node.args[1:]
        for vector, source in zip(args[:4], sources, strict=False):
            if isinstance(vector, StoredTensor):
                self._claims.claim(vector.name, 0, channels, "writes")
            elif isinstance(vector, Tensor):
                reason = f"the weight of {described(node)} is computed"
                self._owners.freeze(channels, reason)
                self._freeze_sources(source, reason)
        return along(channels, 1, x.dim()).expand_as(x)

    def _batch_norm_in_training(self, node: fx.Node, x: Any, *args: Any) -> Any:
        """Also returns the batch's statistics and the new running ones."""
        statistics = pytree.tree_leaves(node.meta["val"])[1:]
        nobody = [torch.tensor(NOBODY).expand(self._trace.concrete(s.shape)) for s in statistics]
        return [self._batch_norm(node, x, *args), *nobody]

    def _convolution(
        self, node: fx.Node, x: Tensor, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        transposed = packet_of(node) in TRANSPOSED
        # after stride, padding, and dilation or output_padding
        groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
        return self._affine(node, x, weight, bias, 1, groups, transposed)

    def _linear(self, node: fx.Node, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
        return self._affine(node, x, weight, bias, -1)

    def _affine(
        self, node: fx.Node, x: Tensor, weight: Any, bias: Any, axis: int, groups: int = 1, transposed: bool = False
    ) -> Tensor:
        """Reads owners along ``axis`` as the weight's columns and writes its rows there."""
        if (
            not isinstance(weight, StoredTensor)
            or not isinstance(bias, StoredTensor | None)
            or not isinstance(x, Tensor)
        ):
            reason = f"the weight of {described(node)} is computed"
            source: Any = node.args[1]
            if source in self._trace.constants:
                reason = f"the weight of {described(node)} is no parameter of the model; is its layer in a plain list?"
                name = qualified(place_of(node), "(not registered)")
                self._claims.freeze(StoredTensor(name, tuple(source.meta["val"].shape)), reason)
            if any(packet_of(source) is aten._to_copy for source in node.all_input_nodes[1:]):
                reason += ", in another dtype; leave autocast to precision= and FineTune(precision=)"
            if any(self._trace.state.get(n, "").endswith("_mask") for n in ancestors(node.all_input_nodes[1:])):
                reason += ", by a mask of torch.nn.utils.prune; make masks permanent first"
            for computed in node.all_input_nodes[1:]:
                self._freeze_sources(computed, reason)
            unknown: Tensor = self._unknown(node, x, weight, bias, reason=reason)
            return unknown
        channels = self._owners.channels(x, axis)
        write = self._transposed_rows if transposed else self._rows
        rows = write(weight, channels, groups)
        if bias is not None:
            self._claims.claim(bias.name, 0, rows, "writes")
        shape = self._trace.shape(node)
        return along(rows, axis, len(shape)).expand(shape)

    def _rows(self, weight: StoredTensor, channels: Tensor, groups: int) -> Tensor:
        if groups > 1 and weight.shape[1] == 1:
            return self._claims.rows_of(weight.name, 0, channels.repeat_interleave(weight.shape[0] // groups))
        # a kernel spans as many columns in every group of a convolution: they lose the same ones
        self._claims.claim(weight.name, 1, self._owners.unite_parts(channels, groups), "reads")
        rows = self._claims.rows(weight, 0)
        self._owners.unite_parts(rows, groups)
        return rows

    def _transposed_rows(self, weight: StoredTensor, channels: Tensor, groups: int) -> Tensor:
        if groups > 1 and groups == weight.shape[0]:
            self._claims.rows_of(weight.name, 0, channels)
            return channels.repeat_interleave(weight.shape[1])
        self._owners.unite_parts(channels, groups)
        self._claims.claim(weight.name, 0, channels, "reads")
        return self._claims.rows(weight, 1).repeat(groups)
