"""What speed is measured on: a network, its folded copy, and the layers that can be pruned by themselves."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from models import load
from torch import nn

import singe
from engine.images import Batch, batches
from singe.graph.analysis import find_groups
from singe.graph.groups import Group
from singe.graph.trace import Trace, trace
from singe.models.precision import prefers_channels_last


@dataclass(frozen=True)
class Subject:
    """A network and its images.

    Attributes:
        name: which of ``models.MODELS``.
        model: unchanged, in eval mode.
        folded: a copy with its batch norms folded, so that all ways to score a layer see the same network.
        graph: of the folded network.
        groups: of the folded network, those that one layer writes and that may be pruned, in execution order.
        coupled: names of those that several layers write together, such as a residual stream.
        data: the folder of the images; None for noise.
        size: how many images a batch has.
        device: where everything is.
    """

    name: str
    model: nn.Module
    folded: nn.Module
    graph: Trace
    groups: list[Group]
    coupled: list[str]
    data: Path | None
    size: int
    device: torch.device

    def batches(self, count: int) -> list[Batch]:
        """Some batches that share no image, in the memory format that is fastest on the device."""
        found = batches(self.name, self.data, self.size, count, self.device)
        return [(x.contiguous(memory_format=memory_format(self.device)), y) for x, y in found]

    def matching(self, pattern: str) -> list[Group]:
        """The groups with a name that a glob matches.

        Raises:
            ValueError: there is none.
        """
        found = [g for g in self.groups if fnmatchcase(g.name, pattern)]
        if not found:
            raise ValueError(f"expected a layer among {', '.join(g.name for g in self.groups)}, got {pattern!r}")
        return found


def prepare(options: Namespace) -> Subject:
    """Loads and folds a network: of ``options`` model, weights, data, batch and device count."""
    device = torch.device(options.device)
    (example, _), *_ = batches(options.model, options.data, 2, 1, device)
    model = load(options.model, options.weights).to(device, memory_format=memory_format(device))
    folded = singe.fold_batchnorm(model, example).model.to(memory_format=memory_format(device))
    graph = trace(folded, example)
    free = [g for g in find_groups(graph) if g.frozen is None]
    alone = [g for g in free if len(g.writers) == 1]
    coupled = [g.name for g in free if len(g.writers) > 1]
    return Subject(options.model, model, folded, graph, alone, coupled, options.data, options.batch, device)


def memory_format(device: torch.device) -> torch.memory_format:
    """The memory format in which convolutions in float32 are fastest."""
    return torch.channels_last if prefers_channels_last("float32", device) else torch.contiguous_format
