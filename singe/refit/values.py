"""What nodes of a network hold for some samples, where nothing is run again that nothing has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ..graph.nodes import ancestors
from ..graph.trace import Env, Trace, named_tensors
from ..models.batches import Batch, length, parts


class Values:
    """Looks into a network again and again, further behind each time or after a few weights have changed.

    What something behind the last look will read stays, if there is room for that, and is taken for what it is as long
    as no tensor that it was computed from is written to or replaced.

    Args:
        graph: of the network.
        inputs: samples, as the network is called with them.
        step: how many of them pass at a time.
        room: bytes that may stay.
    """

    def __init__(self, graph: Trace, inputs: Batch, step: int, room: int) -> None:
        self.graph, self.step = graph, step
        self._parts, self._samples, self._room = list(parts(inputs, step)), length(inputs), room
        self._kept: list[Env] = [{} for _ in self._parts]
        self._known: dict[str, tuple[Tensor, int]] = {}

    def __call__(self, model: nn.Module, ends: Sequence[fx.Node], again: Iterable[fx.Node] = ()) -> Iterator[list[Any]]:
        """What some nodes hold, for one part of the samples after the other.

        Args:
            model: the network as it is now.
            ends: the nodes.
            again: others that will be of use, though nothing behind the ends reads them.
        """
        self._forget_changed(named_tensors(model))
        have = set(self._kept[0])
        nodes = self._between(have, ends)
        stay = self._staying(have | set(nodes), again)
        live, fresh = self.graph.live(model), list[Env]()
        before, self._kept = self._kept, [{} for _ in self._parts]  # nothing stays of a look that is broken off
        for inputs in self._parts:
            env = live | self.graph.feed(inputs) | before.pop(0)
            self.graph.run(nodes, env, length(inputs), keep=[*ends, *stay])
            fresh.append({node: env[node] for node in stay})
            yield [env[node] for node in ends]
        self._kept = fresh

    def _forget_changed(self, tensors: dict[str, Tensor]) -> None:
        """Drops what depends on a tensor that is another or has another version; remembers how they all are now."""
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
        """What has to be run for the ends, in order; sizes follow from the number of samples."""
        needed: set[fx.Node] = set()
        stack = [node for node in ends if node not in have]
        while stack:
            node = stack.pop()
            if node not in needed and not self.graph.is_size(node):
                needed.add(node)
                stack.extend(i for i in node.all_input_nodes if i not in have)
        return [node for node in self.graph.nodes if node in needed]

    def _staying(self, known: set[fx.Node], again: Iterable[fx.Node]) -> list[fx.Node]:
        """Those of the known nodes that others will read, if there is room for them."""
        asked, outputs = set(again), set(self.graph.outputs)
        stay = [
            node
            for node in self.graph.nodes
            if node in known
            and not self.graph.is_size(node)
            and (node in asked or node in outputs or any(user not in known for user in node.users))
        ]
        return stay if self.graph.nbytes(stay, self._samples) <= self._room else []
