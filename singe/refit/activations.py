"""The values of nodes of a network for some samples, computed again only where something has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ..graph.nodes import ancestors
from ..graph.trace import Env, Trace, named_tensors
from ..models.batches import Batch, length, parts
from ..models.precision import formatted, prefers_channels_last


class Activations:
    """Reads activations of a network repeatedly, further downstream each time or after a few weights have changed.

    Those that operators downstream of the last read will need are kept, if there is room, and reused as long as no
    tensor that they were computed from is written to or replaced.

    Args:
        graph: of the network.
        inputs: samples, as the network is called with them.
        step: how many of them pass at a time.
        room: bytes that may be kept.
    """

    def __init__(self, graph: Trace, inputs: Batch, step: int, room: int) -> None:
        self.graph, self.step = graph, step
        self._parts, self._samples, self._room = list(parts(inputs, step)), length(inputs), room
        self._kept: list[Env] = [{} for _ in self._parts]
        self._known: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, model: nn.Module, ends: Sequence[fx.Node], again: Iterable[fx.Node] = ()) -> Iterator[list[Any]]:
        """The values of some nodes, for one part of the samples after the other.

        Args:
            model: the network as it is now.
            ends: the nodes.
            again: others that will be needed, though nothing downstream of the ends reads them.
        """
        self._forget_changed(named_tensors(model))
        have = set(self._kept[0])
        nodes = self._between(have, ends)
        stay = self._staying(have | set(nodes), again)
        live, fresh = self.graph.live(model), list[Env]()
        before, self._kept = self._kept, [{} for _ in self._parts]  # nothing is kept of a read that is aborted
        for inputs in self._parts:
            fed = {node: _fast(value) for node, value in self.graph.feed(inputs).items()}
            env = live | fed | before.pop(0)
            self.graph.run(nodes, env, length(inputs), keep=[*ends, *stay])
            fresh.append({node: env[node] for node in stay})
            yield [env[node] for node in ends]
        self._kept = fresh

    def _forget_changed(self, tensors: dict[str, Tensor]) -> None:
        """Drops values that depend on a tensor that was replaced or changed; remembers the tensors' versions."""
        now = {name: (tensors[name], tensors[name]._version) for name in self.graph.state.values()}
        same = {n for n, (t, version) in self._known.items() if now[n][0] is t and now[n][1] == version}
        stale = {
            node
            for node in self._kept[0]
            if any(self.graph.state[i] not in same for i in ancestors([node]) if i in self.graph.state)
        }
        for kept in self._kept:
            for node in stale:
                kept.pop(node, None)
        self._known = now

    def _between(self, have: set[fx.Node], ends: Iterable[fx.Node]) -> list[fx.Node]:
        """The nodes to run for the ends, in order; sizes follow from the number of samples."""
        needed: set[fx.Node] = set()
        stack = [node for node in ends if node not in have]
        while stack:
            node = stack.pop()
            if node not in needed and not self.graph.is_size(node):
                needed.add(node)
                stack.extend(i for i in node.all_input_nodes if i not in have)
        return [node for node in self.graph.nodes if node in needed]

    def _staying(self, known: set[fx.Node], again: Iterable[fx.Node]) -> list[fx.Node]:
        """The known nodes that others will read, if there is room for them."""
        asked, outputs = set(again), set(self.graph.outputs)
        stay = [
            node
            for node in self.graph.nodes
            if node in known
            and not self.graph.is_size(node)
            and (node in asked or node in outputs or any(user not in known for user in node.users))
        ]
        return stay if self.graph.nbytes(stay, self._samples) <= self._room else []


def _fast(images: Tensor) -> Tensor:
    return formatted(images, prefers_channels_last("float32", images.device))
