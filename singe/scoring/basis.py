"""The input of a linear layer in fewer numbers, where only lengths of its weight's gradients count."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from ..graph.layer import Layer


class Bases:
    """Inputs of layers, kept in the basis that their samples span.

    A row's gradient in a linear layer is G = sum over samples and positions i of delta_i x_i. With X = R^T Q^T, from
    the QR decomposition of the transposed inputs X [samples and positions, C], the gradient in terms of the shorter
    rows of R^T has the same 2-norm, as Q only turns it.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor] = {}

    def reduced(self, layer: Layer, x: Tensor, norms: int) -> Tensor:
        """[B, R, T], what gives the same 2-norms as x with R = B T; or x itself where that saves too little.

        As for an expert that no sample reaches, of which B is 0.

        Args:
            layer: whose input it is, the same at every call.
            x: [B, C, T].
            norms: about how many are wanted: the decomposition takes as long as some R of them.
        """
        rows = len(x) * x.shape[-1]
        if not layer.is_linear or not rows or 2 * rows > min(x.shape[1], norms):
            return x
        if layer.output not in self._kept:
            inputs = x.detach().movedim(1, -1).flatten(0, 1)  # [B T, C]
            factor = torch.linalg.qr(inputs.double().T, mode="r")[1].T  # [B T, B T]
            kept = factor.to(torch.promote_types(x.dtype, torch.float32))
            self._kept[layer.output] = kept.unflatten(0, (len(x), -1)).movedim(-1, 1).contiguous()
        return self._kept[layer.output]
