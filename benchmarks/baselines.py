"""Equation 4 in plain torch, three ways: what the engine is measured against.

Each scores one neuron of one layer of a network without batch norms at some nodes, by |W|^2-norm times the norm of the
gradient of the mean cross-entropy with respect to the faded row, and leaves the network as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from singe.quadrature import Nodes

Batch = tuple[Tensor, Tensor]
Baseline = Callable[[nn.Module, Batch, str, int, Nodes], float]


def backward(model: nn.Module, batch: Batch, layer: str, neuron: int, nodes: Nodes) -> float:
    """The literal loop: fade the row, ``loss.backward()``."""
    weight, total = model.get_submodule(layer).weight, 0.0
    norm = float(weight[neuron].detach().norm())
    for t, w in zip(*(v.tolist() for v in nodes), strict=True):
        with faded(model, layer, neuron, t):
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        total += w * norm * float(weight.grad[neuron].norm())
    return total


def to_the_layer(model: nn.Module, batch: Batch, layer: str, neuron: int, nodes: Nodes) -> float:
    """The same with a backward pass that stops at the layer's weight."""
    weight, total = model.get_submodule(layer).weight, 0.0
    norm = float(weight[neuron].detach().norm())
    for t, w in zip(*(v.tolist() for v in nodes), strict=True):
        with faded(model, layer, neuron, t):
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), weight)
        total += w * norm * float(gradient[neuron].norm())
    return total


def vectorised(model: nn.Module, batch: Batch, layer: str, neuron: int, nodes: Nodes) -> float:
    """``torch.func.vmap`` over the nodes, differentiating with respect to the row alone."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    weight, bias = (parameters.get(f"{layer}.{kind}") for kind in ("weight", "bias"))
    row = weight[neuron]

    def loss(faded_row: Tensor, t: Tensor) -> Tensor:
        changed = {f"{layer}.weight": torch.cat([weight[:neuron], faded_row[None], weight[neuron + 1 :]])}
        if bias is not None:
            changed[f"{layer}.bias"] = torch.cat([bias[:neuron], (t * bias[neuron])[None], bias[neuron + 1 :]])
        return F.cross_entropy(functional_call(model, parameters | changed, (batch[0],)), batch[1])

    t, node_weight = (v.to(row) for v in nodes)
    gradients = vmap(grad(loss))(t.view(-1, *[1] * row.dim()) * row, t)
    return float((node_weight * gradients.flatten(1).norm(dim=1)).sum() * row.norm())


BASELINES: dict[str, Baseline] = {"backward": backward, "to the layer": to_the_layer, "vmap": vectorised}


@contextmanager
def faded(model: nn.Module, layer: str, neuron: int, t: float) -> Iterator[None]:
    """Scales a neuron's weights and bias by t inside."""
    module = model.get_submodule(layer)
    rows = [p.data[neuron] for p in (module.weight, module.bias) if p is not None]
    kept = [row.clone() for row in rows]
    for row in rows:
        row.mul_(t)
    try:
        yield
    finally:
        for row, value in zip(rows, kept, strict=True):
            row.copy_(value)
