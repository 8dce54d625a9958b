"""The inputs of the unpruned network's layers, as targets for those of a pruned one (Romero et al. 2015)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..ranks import ALONE, Ranks
from ..removal.surgery import Removed

log = logging.getLogger("singe")

Affine = nn.Linear | _ConvNd

Reads = Mapping[str, Sequence[Tensor]]
"""Name of a module -> its inputs, call by call."""


@contextlib.contextmanager
def reading(model: nn.Module) -> Iterator[Reads]:
    """Records the inputs of convolutions and linear layers of a network while this lasts."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and not args[0].is_nested:
            seen.setdefault(name, []).append(args[0])

    handles = [module.register_forward_pre_hook(partial(note, name)) for name, module in _layers(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Hints:
    """Compares the inputs of layers of a pruned network with those in the unpruned one.

    It compares the channels that are left, in every layer whose input depends on something that is trained. Grouped
    convolutions are left out, and so are inputs that are read more often, or in other shapes, in one of the networks,
    and those of experts that no sample reaches.

    Args:
        unpruned: the network as it was.
        ranks: that train together.
    """

    def __init__(self, unpruned: nn.Module, ranks: Ranks = ALONE) -> None:
        self._modules, self._ranks = dict(_layers(unpruned)), ranks
        first = {id(tensor): name for name, tensor in unpruned.named_parameters()}  # tied ones are cut by that name
        self._weights = {name: first.get(id(m.weight), f"{name}.weight") for name, m in self._modules.items()}
        self._kept: dict[str, Tensor] = {}
        self._scales: dict[str, float] | None = None
        self._told: set[str] = set()

    def keep(self, removed: Removed) -> None:
        """Sets what is removed from the unpruned network: (tensor name, axis) -> indices; restarts the mean squares."""
        self._kept, self._scales = {}, None  # in every stage, so that a run can be resumed from any of them
        for name, module in self._modules.items():
            axis = 0 if isinstance(module, _ConvNd) and module.transposed else 1
            gone = removed.get((self._weights[name], axis))
            if gone is not None:
                stays = torch.ones(module.weight.shape[axis], dtype=torch.bool)
                stays[gone] = False
                self._kept[name] = stays.nonzero().flatten().to(module.weight.device)

    def distance(self, ours: Reads, theirs: Reads) -> Tensor:
        """The mean over layers of mean((x - y)^2) / s: a scalar.

        x is the input of a layer in the pruned network, y its input in the unpruned one, and s the mean square of
        all of y on the first batches since ``keep``, over all ranks.

        Raises:
            ValueError: nothing can be compared.
        """
        if self._scales is None:
            self._scales = self._measured(theirs)
        scales = self._scales
        apart = {
            (name, place): _squares(x - y) / (x.numel() * scales[name])
            for name in theirs
            if scales.get(name) and len(ours.get(name, ())) == len(theirs[name])
            for place, (x, whole) in enumerate(zip(ours[name], theirs[name], strict=True))
            if x.requires_grad and len(x) and x.shape == (y := self._left(name, whole)).shape
        }
        if not apart:
            raise ValueError(
                "expected layers after trained ones that read as much as in the unpruned network, got none among "
                f"{', '.join(theirs) or 'no layers'}; pass hints=0"
            )
        if left_out := theirs.keys() - {name for name, _ in apart} - self._told:
            log.info("no hints for %s: nothing trained before, or other inputs", ", ".join(sorted(left_out)))
            self._told |= left_out
        return torch.stack(list(apart.values())).mean()

    def _left(self, name: str, y: Tensor) -> Tensor:
        """The channels that are left of the input of a layer of the unpruned network."""
        if name not in self._kept:
            return y
        module = self._modules[name]
        positions = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
        return y.index_select(-1 - positions, self._kept[name])

    def _measured(self, theirs: Reads) -> dict[str, float]:
        """The mean square of every layer's input."""
        if not theirs:
            return {}
        sums = torch.stack([torch.stack([_squares(y) for y in calls]).sum() for calls in theirs.values()])
        counts = torch.tensor([float(sum(y.numel() for y in calls)) for calls in theirs.values()]).to(sums)
        means = self._ranks.sum(sums) / self._ranks.sum(counts).clamp_min(1)  # nothing may have been read
        return dict(zip(theirs, means.tolist(), strict=True))


def _layers(model: nn.Module) -> Iterator[tuple[str, Affine]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, _ConvNd) and module.groups == 1):
            yield name, module


def _squares(t: Tensor) -> Tensor:
    """Their sum, in single precision or better."""
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).square()
