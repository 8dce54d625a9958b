"""The layer after the faded one without running it: each neuron's contribution to it is known.

With y the next layer's output and c_n what neuron n contributes to it (see ``front.py``), fading n to t gives
y + (t - 1) c_n, and removing n leaves y - c_n. Backwards, only the faded neuron's channel of the gradient is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from .. import ops
from ..graph.layer import Layer, geometry_of
from ..graph.operators import aten
from ..graph.trace import Env, evaluate
from ..models.precision import wide
from .front import Front
from .jobs import Jobs, beside


class Incremental:
    """The output of the front of a suffix for any job, kept up to date while neurons are removed.

    Args:
        front: the stretch after the layer that fades.
        layer: that layer, with one row per neuron.
        values: node -> value, of the layer's output and of the constants that the front adds.
        weight: of the front's reader, batch norm folded in.
        bias: likewise, or None.
        keep: whether to keep the contributions of all neurons, or to compute them when asked for.
    """

    def __init__(
        self, front: Front, layer: Layer, values: Env, weight: Tensor, bias: Tensor | None, keep: bool
    ) -> None:
        self._front, self._layer = front, layer
        self._weight = weight.clone()  # masks zero the live one
        self._z = values[layer.output].to(weight.dtype)
        base = self._read(self._through_chain(self._z), self._weight, bias)
        for node in front.tail:
            if node.target is aten.add.Tensor:
                base += next(values[i] for i in node.all_input_nodes if i in values)
        self._base = wide(base)  # hundreds of differences add up in it
        self._keeps = keep

    @property
    def output(self) -> fx.Node:
        """The node of the front's output."""
        return self._front.output

    def fade(self, jobs: Jobs) -> Tensor:
        """[K*B, ...]: the front's output under K jobs."""
        assert jobs.neuron is not None
        if self._keeps:
            contributions, index = self._all_contributions, jobs.neuron
        else:
            neurons, counts = torch.unique_consecutive(jobs.neuron, return_counts=True)
            contributions, index = self._contributions(neurons), torch.arange(len(neurons)).repeat_interleave(counts)
        base = self._base.to(contributions.dtype)
        return ops.fade_next(
            base, contributions, beside(index, base), beside(jobs.t, base), self._front.relu is not None
        )

    def delta(self, jobs: Jobs, output: Tensor, gradient: Tensor) -> Tensor:
        """[K, B, *positions]: the gradient at each job's neuron in the layer's output, from that at ``output``."""
        if self._front.relu is not None:
            gradient = aten.threshold_backward(gradient, output, 0)
        assert jobs.neuron is not None
        with torch.enable_grad():
            leaf = self._channels(jobs.neuron, jobs.t).requires_grad_()
            read = self._through_chain(leaf)
        neurons, counts = torch.unique_consecutive(jobs.neuron, return_counts=True)
        parts = gradient.split((counts * (len(gradient) // len(jobs))).tolist())
        columns = self._columns(neurons)
        back = torch.cat([self._read_backward(p, c, read.shape) for p, c in zip(parts, columns, strict=True)])
        (delta,) = torch.autograd.grad(read, leaf, back.to(leaf.dtype))
        return self._layer.channels_first(delta).squeeze(1).unflatten(0, (len(jobs), -1))

    def remove(self, neurons: Sequence[int]) -> None:
        """Removes neurons permanently."""
        gone, device = torch.tensor(neurons), self._base.device
        if self._keeps and self._all_contributions.dtype == self._base.dtype:
            ops.remove_neurons(self._base, self._all_contributions, gone.to(device))
        else:
            for one in gone.split(1):  # a copy of each in turn
                own = self._all_contributions[one.to(device)] if self._keeps else self._contributions(one)
                ops.remove_neurons(self._base, wide(own), torch.zeros_like(one, device=device))
        if self._keeps:
            self._all_contributions.index_fill_(0, gone.to(device), 0)
        self._weight[:, self._columns(gone)] = 0
        self._z.index_fill_(self._layer.axis, self._layer.rows[gone].flatten().to(self._z.device), 0)

    @cached_property
    def _all_contributions(self) -> Tensor:
        return self._contributions(torch.arange(len(self._layer.rows)))

    def _contributions(self, neurons: Tensor) -> Tensor:
        """[n, B, ...]: what each neuron adds to the next layer's output, with the same memory layout."""
        base = self._base
        result = torch.empty_strided(
            (len(neurons), *base.shape), (base.numel(), *base.stride()), dtype=self._z.dtype, device=base.device
        )
        inputs = self._through_chain(self._channels(neurons, torch.ones(len(neurons)))).chunk(len(neurons))
        for own, x, column in zip(result, inputs, self._columns(neurons), strict=True):
            own.copy_(self._read(x, self._weight[:, column : column + 1], None))
        return result

    def _columns(self, neurons: Tensor) -> list[int]:
        columns: list[int] = self._layer.rows[neurons, 0].tolist()
        return columns

    def _channels(self, neurons: Tensor, t: Tensor) -> Tensor:
        """[n*B, ...] with one channel: each neuron's own in the layer's output, times t."""
        axis = self._layer.axis
        own = self._z.index_select(axis, self._layer.rows[neurons, 0].to(self._z.device)).movedim(axis, 0)
        own = own * t.to(own).view(-1, *[1] * (own.dim() - 1))
        return own.flatten(0, 1).unsqueeze(axis)

    def _through_chain(self, value: Tensor) -> Tensor:
        for node in self._front.chain:
            value = evaluate(node, (value, *node.args[1:]), dict(node.kwargs))
        return value

    def _read(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        value: Tensor = evaluate(self._front.reader, (x, weight, bias, *self._front.reader.args[3:]), {})
        return value

    def _read_backward(self, gradient: Tensor, column: int, shape: torch.Size) -> Tensor:
        """The gradient at one channel of the reader's input, [B, ...] of ``shape``, from that at its output."""
        weight = self._weight[:, column]  # [M, *kernel]
        if weight.dim() == 1:
            return (gradient @ weight).unsqueeze(-1)
        g = geometry_of(self._front.reader)
        window = tuple(g.kernel_size), tuple(g.dilation), tuple(g.padding), tuple(g.stride)
        # what each output position sends to each tap of its window, then added up where windows overlap
        taps = F.conv2d(gradient, weight.flatten(1).t()[:, :, None, None])  # [B, taps, H', W']
        return F.fold(taps.flatten(2), shape[2:], *window)
