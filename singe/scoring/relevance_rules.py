"""How each ATen operator passes the relevance of its output back to its inputs: the rules of propagation.

To add an operator, put it into :data:`_RULES` with one of the rules, or write one: a function of a :class:`Step` and
the relevance of its output that returns the relevance of its inputs, which must add up to that of the output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..graph import batchnorm
from ..graph.nodes import argument, packet_of
from ..graph.operators import CONVOLUTIONS, MOVES, PADS, SPLITS, TRANSPOSED, aten
from ..graph.trace import Env, evaluate
from .backward import gradients

EPSILON = 1e-12
"""Contributions whose sum is no more than this count as zero."""

Relevances = dict[fx.Node, Any]
"""The relevance of an operator's inputs, in the shapes of their values."""


@dataclass(frozen=True, eq=False)
class Step:
    """An operator and its arguments.

    Attributes:
        node: the operator.
        known: the value of each of its arguments that is a node.
        activations: those of them that depend on the network's inputs.
        live: the model's parameters and buffers.
        alpha: how much of the relevance goes to what excites; alpha - 1 is taken from what inhibits.
    """

    node: fx.Node
    known: Mapping[fx.Node, Any]
    activations: tuple[fx.Node, ...]
    live: Env
    alpha: float

    def run(self, values: Mapping[fx.Node, Any]) -> Any:
        """The operator's output with some of its arguments replaced."""

        def value(node: fx.Node) -> Any:
            return values[node] if node in values else self.known[node]

        return evaluate(self.node, fx.map_arg(self.node.args, value), fx.map_arg(self.node.kwargs, value))

    def backward(self, values: Relevances, cotangent: Callable[[Any], Any]) -> Relevances:
        """The operator's transposed at some values of its activations.

        Args:
            values: of all of them.
            cotangent: output -> what to transpose, nested as the output is. Indices have none.
        """
        with torch.enable_grad():
            leaves = pytree.tree_map(lambda t: t.detach().requires_grad_(t.is_floating_point()), values)
            output = self.run(leaves)
            given = pytree.tree_leaves(cotangent(pytree.tree_map(Tensor.detach, output)))
            inputs = [t for t in pytree.tree_leaves(leaves) if t.requires_grad]
            found = gradients(pytree.tree_leaves(output), given, inputs)
        known = dict(zip(map(id, inputs), found, strict=True))
        return {n: pytree.tree_map(lambda t: known.get(id(t), torch.zeros_like(t)), leaves[n]) for n in values}


Rule = Callable[[Step, Any], Relevances]


# -- the rules -------------------------------------------------------------------------------------------------


def passed(step: Step, relevance: Tensor) -> Relevances:
    """One to one, as through an activation function or a batch norm."""
    (x,) = step.activations
    return {x: relevance}


def moved(step: Step, relevance: Any) -> Relevances:
    """Elements move, or only some of them, as the winners of max pooling do: relevance goes back with them."""
    return step.backward({n: step.known[n] for n in step.activations}, lambda _: relevance)


def summed(step: Step, relevance: Tensor) -> Relevances:
    """In proportion to the magnitudes of the terms: R_a = |a| / (|a| + |b|) R."""
    sizes = {n: _magnitude(step.known[n]) for n in step.activations}
    total = torch.stack(torch.broadcast_tensors(*sizes.values(), relevance)[:-1]).sum(0)
    return {n: (relevance * size / total).sum_to_size(size.shape) for n, size in sizes.items()}


def averaged(step: Step, relevance: Tensor) -> Relevances:
    """In proportion to the magnitudes of the terms of a mean or a sum along axes."""
    sizes = {n: _magnitude(step.known[n]) for n in step.activations}
    shares = step.backward(sizes, lambda total: relevance / total)
    return {n: size * shares[n] for n, size in sizes.items()}


def weighted(step: Step, relevance: Tensor) -> Relevances:
    """By alpha and beta = alpha - 1, with z+-_ij = max(+-x_i w_ij, 0) and z+-_j the sum of that over i.

    R_i = sum over j of (alpha z+_ij / z+_j - beta z-_ij / z-_j) R_j. Where nothing inhibits, z-_j = 0, alpha is 1 and
    beta 0; where nothing excites, z+_j = 0, alpha is 0 and beta -1: all relevance goes to the terms there are. Where
    there are none, it ends. Biases do not count, and the batch norm after the layer counts as a factor: a negative one
    swaps z+ and z-.
    """
    x: Any = step.node.args[0]
    weight: Any = step.node.args[1]
    bias: Any = argument(step.node, 2, "bias", None)
    parts = {sign: part for sign, part in _parts(step.known[x]).items() if sign > 0 or part.any()}
    weights = _parts(step.known[weight])

    def contributions(leaves: Mapping[int, Tensor], sign: int) -> Tensor:
        values = ({x: leaf, weight: weights[sign * own], bias: None} for own, leaf in leaves.items())
        total: Tensor = sum(map(step.run, values))
        return total

    with torch.enable_grad():
        leaves = {sign: part.requires_grad_() for sign, part in parts.items()}
        z = [contributions(leaves, sign) for sign in (1, -1)]
        shares = _shares(z[0].detach(), z[1].detach(), relevance, step)
        gradients = torch.autograd.grad(z, list(leaves.values()), shares)
    return {x: sum(p.detach() * g for p, g in zip(parts.values(), gradients, strict=True))}


def _shares(excites: Tensor, inhibits: Tensor, relevance: Tensor, step: Step) -> list[Tensor]:
    """The share of R_j that each unit of z+_ij and z-_ij gets."""
    if (swapped := _negative(step, excites)) is not None:
        excites, inhibits = torch.where(swapped, inhibits, excites), torch.where(swapped, excites, inhibits)
    has = [z > EPSILON for z in (excites, inhibits)]
    both = has[0] & has[1]
    shares = [
        torch.where(own, torch.where(both, part, 1.0) * relevance / torch.where(own, z, 1.0), 0.0)
        for own, z, part in zip(has, (excites, inhibits), (step.alpha, 1 - step.alpha), strict=True)
    ]
    if swapped is not None:
        shares = [torch.where(swapped, a, b) for a, b in (shares[::-1], shares)]
    return shares


def _negative(step: Step, like: Tensor) -> Tensor | None:
    """Where the batch norm after the layer flips signs, shaped to broadcast to the output; None where it never does."""
    norm = batchnorm.following(step.node)
    if norm is None or not (negative := batchnorm.affine(norm, step.live).scale < 0).any():
        return None
    return negative.view(1, -1, *[1] * (like.dim() - 2))


def _parts(value: Tensor) -> dict[int, Tensor]:
    """Sign -> max(sign * value, 0)."""
    return {sign: (sign * value.detach()).clamp(min=0) for sign in (1, -1)}


def _magnitude(value: Tensor) -> Tensor:
    """|value|, but nowhere zero, so that zeros among themselves get equal shares."""
    return value.detach().abs() + 1e-20


# -- rules by operator -----------------------------------------------------------------------------------------

_ONE_TO_ONE = (
    aten.relu, aten.relu6, aten.hardtanh, aten.leaky_relu, aten.prelu, aten.elu, aten.celu, aten.selu, aten.gelu,
    aten.silu, aten.mish, aten.hardswish, aten.tanh, aten.batch_norm, aten.dropout, aten.feature_dropout,
    aten.alpha_dropout, aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy, aten._to_copy,
)  # fmt: skip
_WINNERS = (
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.max_pool2d_with_indices, aten.max_pool3d_with_indices,
    aten.adaptive_max_pool1d, aten.adaptive_max_pool2d, aten.adaptive_max_pool3d,
)  # fmt: skip
_MEANS = (
    aten.mean, aten.sum, aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d, aten._adaptive_avg_pool2d, aten._adaptive_avg_pool3d,
    aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d, aten.upsample_bilinear2d,
)  # fmt: skip
_MOVES = (*MOVES, *SPLITS, *PADS, *_WINNERS, aten.cat, aten.stack, aten.channel_shuffle, operator.getitem)

_RULES: dict[Any, Rule] = {
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED, aten.linear), weighted),
    **dict.fromkeys(_ONE_TO_ONE, passed),
    **dict.fromkeys(_MOVES, moved),
    **dict.fromkeys(_MEANS, averaged),
    **dict.fromkeys((aten.add, aten.sub), summed),
}


def rule_of(node: fx.Node, weights: Mapping[fx.Node, Any]) -> Rule | None:
    """The rule of an operator; None where it has none.

    Args:
        node: the operator.
        weights: the nodes that stand for parameters, buffers and constants.
    """
    rule = _RULES.get(packet_of(node) or node.target)
    if rule is passed and sum(n not in weights for n in node.all_input_nodes) != 1:
        return None
    if rule is weighted and (node.args[1] not in weights or node.args[0] in weights):
        return None  # the weight is computed, or its input is a parameter
    if rule is summed and argument(node, 2, "alpha", 1) != 1:
        return None
    return rule
