"""What belongs to fading one group: the layers that write it, what fades with them, and the operators downstream."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from ..graph import batchnorm
from ..graph.groups import Group
from ..graph.layer import find_layers, is_affine
from ..graph.riders import find_riders
from ..graph.suffix import cut
from ..graph.trace import Env, Trace
from .front import find_front
from .stretch import Stretch, stretch


class Downstream:
    """A group's place in a trace.

    Args:
        trace: of the model.
        group: which neurons.
        live: the model's values, by node.

    Attributes:
        layers: the group's writers, in execution order.
        by_output: the same by the node of their output.
        riders: what is added to its neurons downstream of them, by node.
        suffix: the operators that depend on them.
        foldable: the suffix's layers that can include the batch norm after them.
        whole: the suffix as it runs for jobs of any kind.
        front: its beginning, where fading one neuron moves values along one direction; None where there is none.
        behind: what runs for jobs that fade one neuron: the part after the front, or the whole suffix.
    """

    def __init__(self, trace: Trace, group: Group, live: Env) -> None:
        self._trace = trace
        self.layers = find_layers(trace, group)
        self.by_output = {layer.output: layer for layer in self.layers}
        self.suffix = cut(trace, self.by_output)
        layers = (n for n in self.suffix.nodes if is_affine(n) and n not in self.by_output)  # what fades itself stays
        self.foldable = [n for n in layers if batchnorm.folds(n, live)]
        self._absorbed = {norm for n in self.foldable if (norm := batchnorm.following(n)) is not None}
        ride = [n for n in self.suffix.nodes if n not in self.by_output]
        self.riders = {rider.node: rider for rider in find_riders(trace, group, ride)}
        self.whole = self._stretch(self.suffix.nodes, self.suffix.roots)
        # where only one layer fades, with a row per neuron
        simple = len(self.layers) == 1 and not self.riders and self.layers[0].rows.shape[1] == 1
        self.front = find_front(trace, self.suffix, self.layers[0], self._absorbed) if simple else None
        self.behind = self.whole
        if self.front is not None:
            nodes = (n for n in self.suffix.nodes if n not in self.front.nodes)
            self.behind = self._stretch(nodes, [self.front.output])

    @property
    def inputs(self) -> list[fx.Node]:
        """The inputs of the layers that the suffix begins with."""
        return [layer.x for layer in self.layers if layer.output in self.suffix.roots]

    @property
    def kept(self) -> list[fx.Node]:
        """The values of the prefix that passes need."""
        return [*self.suffix.boundary, *self.suffix.roots, *self.inputs]

    def _stretch(self, nodes: Iterable[fx.Node], sources: Iterable[fx.Node]) -> Stretch:
        return stretch(self._trace, self.suffix, nodes, sources, {*self.by_output, *self.riders}, self._absorbed)
