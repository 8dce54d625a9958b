"""What all rules share: the owners, their claims, and the treatment of operators without a rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..claims import Claims, StoredTensor
from ..groups import qualified
from ..mirrors import representative, varies
from ..nodes import described, place_of
from ..owners import Owners
from ..stored import Stored
from ..trace import Trace


class Base:
    """Rules for the operators of one trace.

    Args:
        owners: of the activations.
        claims: what they own.
        trace: whose operators are run.
    """

    def __init__(self, owners: Owners, claims: Claims, trace: Trace) -> None:
        self._owners, self._claims, self._trace = owners, claims, trace
        self._stored = Stored(trace)

    def _unknown(self, node: fx.Node, *args: Any, reason: str | None = None, **kwargs: Any) -> Any:
        """Freezes every neuron an operator without a rule reads, and issues frozen ids for what it writes."""
        reason = reason or f"no rule for {described(node)}"
        for value in pytree.tree_leaves((args, kwargs)):
            if isinstance(value, StoredTensor):
                self._claims.freeze(value, reason)
            elif isinstance(value, Tensor):
                self._owners.freeze(value, reason)

        def issue(value: Any) -> Any:
            return fixed(self._owners, self._trace.concrete(value.shape), reason)

        return pytree.tree_map_only(Tensor, issue, node.meta["val"])

    def _freeze_sources(self, node: fx.Node, reason: str) -> None:
        """Freezes the parameters that a stored value is computed from."""
        for source in self._stored.sources(node):
            self._claims.freeze(StoredTensor(self._trace.state[source], tuple(source.meta["val"].shape)), reason)

    def _note_widths(self, node: fx.Node, *mirrors: Tensor) -> None:
        """Remembers the attributes that the module's code may use as the length of an axis of neurons."""
        place = place_of(node)
        for name, value in self._trace.attributes.get(place, {}).items():
            for owners in mirrors:
                for axis in range(owners.dim()):
                    if owners.shape[axis] == value and varies(owners, axis):
                        others = [i for i in range(owners.dim()) if i != axis]
                        neurons = representative(owners, others).flatten()
                        self._claims.width(qualified(place, name), neurons)

    def _filled(self, node: fx.Node, owners: Tensor) -> Any:
        """Owners expanded to each of the node's outputs."""
        return pytree.tree_map_only(Tensor, lambda v: owners.expand(self._trace.concrete(v.shape)), node.meta["val"])


def fixed(owners: Owners, shape: tuple[int, ...], reason: str) -> Tensor:
    """Frozen owners of a tensor whose channels, should it have any, are at axis 1."""
    ids = owners.issue([size if axis == min(1, len(shape) - 1) else 1 for axis, size in enumerate(shape)])
    owners.freeze(ids, reason)
    return ids.expand(shape)
