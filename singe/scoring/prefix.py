"""What jobs on a group have in common: the model's current parameters, and the values before the group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph import batchnorm
from ..graph.groups import Group
from ..graph.nodes import packet_of
from ..graph.operators import CONVOLUTIONS
from ..graph.trace import Env, Trace
from ..models.precision import formatted
from .downstream import Downstream


class Prefix:
    """Parameters and buffers of a model that loses neurons of a group one by one, and the operators before the group.

    Args:
        model: the module whose parameters are read live; removals are masked in it (see ``surgery.mask``).
        trace: of that model.
        group: of the neurons.
        inputs: of the model, nested tensors [B, ...].
        channels_last: whether convolutions are fastest in that format.

    Attributes:
        down: the group's place in the trace.
        live: the values of parameters and buffers by node, in the memory format that passes are fastest in.
        folded: weight and bias of layers downstream of the group, with the batch norm after them folded in.
    """

    def __init__(self, model: nn.Module, trace: Trace, group: Group, inputs: Any, channels_last: bool) -> None:
        self._model, self._trace, self._inputs, self._channels_last = model, trace, inputs, channels_last
        self._owned = {s.tensor for s in group.slices}
        self.live = self._formatted(trace.live(model))
        self.down = Downstream(trace, group, self.live)
        self.folded: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self._fold(self.down.foldable)

    def refresh(self) -> None:
        """Rereads the parameters that the group owns, after neurons of it have been masked."""
        live, state = self._trace.live(self._model), self._trace.state
        owned = {node: live[node] for node, name in state.items() if name in self._owned}
        self.live |= self._formatted(owned)
        self._fold(call for call in self.down.foldable if not owned.keys().isdisjoint(call.all_input_nodes))

    def weights(self, call: fx.Node) -> tuple[Tensor, Tensor | None]:
        """Weight and bias that a layer runs with."""
        if call in self.folded:
            return self.folded[call]
        weight, bias = (call.args[i] if i < len(call.args) else None for i in (1, 2))
        return self.live[weight], None if bias is None else self.live[bias]  # type: ignore[index]

    def values(self, start: int, size: int) -> Env:
        """The values that passes need for the images from ``start`` on: before the group and of its first layers."""
        fed = self._trace.feed(self._inputs)
        env: Env = self.live | {
            node: formatted(value[start : start + size], self._channels_last) for node, value in fed.items()
        }
        with torch.no_grad():
            self._trace.run(self.down.suffix.prefix, env, size, keep=self.down.kept)
        return {node: env[node] for node in self.down.kept}

    def _fold(self, calls: Iterable[fx.Node]) -> None:
        """Folds the batch norms after these layers into them, as they are now."""
        self.folded |= {call: batchnorm.folded(call, self.live) for call in calls}

    def _formatted(self, live: Env) -> Env:
        kernels = {n.args[1] for n in self._trace.nodes if packet_of(n) in CONVOLUTIONS}
        return {
            node: formatted(value, self._channels_last) if node in kernels else value for node, value in live.items()
        }
