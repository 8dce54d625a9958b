"""What the zoo holds: a network, how it is called, and what must be found in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from networks import images, randomised
from torch import Tensor, nn

from singe.graph.trace import Forward


def pictures() -> Tensor:
    """[4, 3, 16, 16]."""
    return images(4, 16)[0]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        build: the network, with weights from torch's generator.
        inputs: what goes in, for four samples.
        forward: (model, inputs) -> outputs, for a network that is not ``model(x)``.
        free: module -> how many of the neurons that it is the first to write can go.
        frozen: module -> a part of the reason why none of them can, in lower case without spaces and underscores;
            of a module whose weights write no neurons at all, why it was not followed.
        doubtful: modules whose width is written into the code that runs, where the exported graph cannot see it; their
            neurons may be called free until a trial fails.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any] = pictures
    forward: Forward | None = None
    free: Mapping[str, int] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict)
    doubtful: Collection[str] = ()

    def make(self) -> nn.Module:
        """The network with random weights and statistics, the same every time, in eval mode."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return randomised(self.build())
