"""The weights of a layer that absorbs a change of the channels around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from ..graph.batchnorm import affine_of
from .channels import AffineLayer
from .roots import Change


def absorbed(module: Any, layer: AffineLayer, change: Change) -> tuple[Tensor, Tensor]:
    """Weight and bias, in the weight's dtype, with which a layer writes changed channels from changed channels.

    For y = W x + b that is W' = scale W factor and b' = scale (b - W offset) + shift, with W summed over its positions.

    Args:
        module: a convolution, a linear layer or a batch norm.
        layer: its call.
        change: of the channels.
    """
    weight, bias = _map_of(module)
    blocks = _blocks(module, weight, layer)
    groups, device = len(blocks), weight.device
    scale, shift = (t[layer.writes].to(device) for t in (change.scale, change.shift))
    factor, offset = (t[layer.reads].to(device).view(groups, -1) for t in (change.factor, change.offset))
    bias = scale * (bias - torch.einsum("goip,gi->go", blocks, offset).flatten()) + shift
    blocks.mul_(scale.view(groups, -1, 1, 1) * factor[:, None, :, None])
    if isinstance(module, _BatchNorm):
        statistics: Any = module
        bias = bias + weight * statistics.running_mean
        weight = weight * (statistics.running_var.double() + module.eps).sqrt()
    return torch.empty_like(module.weight).copy_(weight), bias.to(module.weight.dtype)


def _map_of(module: Any) -> tuple[Tensor, Any]:
    """Weight and bias as they act, in float64, the weight a contiguous copy; a batch norm scales and shifts."""
    if isinstance(module, _BatchNorm):
        known = affine_of(module)
        return known.scale, known.shift
    weight = torch.empty_like(module.weight, dtype=torch.float64, memory_format=torch.contiguous_format)
    return weight.copy_(module.weight), 0 if module.bias is None else module.bias.detach().double()


def _blocks(module: nn.Module, weight: Tensor, layer: AffineLayer) -> Tensor:
    """A view [groups, outputs, inputs, positions] of a contiguous weight."""
    if isinstance(module, _BatchNorm):
        return weight.view(-1, 1, 1, 1)
    whole = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
    if isinstance(module, _ConvTransposeNd):
        return whole.unflatten(0, (len(layer.writes) // weight.shape[1], -1)).transpose(1, 2)
    return whole.unflatten(0, (len(layer.reads) // weight.shape[1], -1))
