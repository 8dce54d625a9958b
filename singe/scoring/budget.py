"""How much memory passes on one group take, and how many jobs fit."""

from __future__ import annotations

import torch

from ..graph.trace import Trace
from ..memory import CPU_VALUE
from .downstream import Downstream
from .stretch import Stretch


class Budget:
    """Plans passes so that values, their gradients and what is cached between passes stay within ``memory`` bytes.

    Args:
        trace: of the model.
        down: what depends on the group.
        images: how many.
        neurons: how many the group has.
        memory: bytes; one job on one image may exceed them.
        device: where passes run.
    """

    def __init__(
        self, trace: Trace, down: Downstream, images: int, neurons: int, memory: int, device: torch.device
    ) -> None:
        self._trace, self._down, self._images, self._memory = trace, down, images, memory
        self._front = trace.nbytes([down.front.end], images) if down.front is not None else 0
        self._contributions = self._front * neurons
        self._largest = CPU_VALUE * torch.get_num_threads() if device.type == "cpu" else memory

    @property
    def needed(self) -> int:
        """Bytes of one job on all images, without the front."""
        return self._pass(self._down.whole) + self._cached()

    @property
    def keeps_contributions(self) -> bool:
        """Whether what every neuron contributes to the next layer stays in memory."""
        return self._contributions <= self._memory // 4

    def parts(self) -> list[int]:
        """The numbers of images in the parts of a pass: one part where all fit."""
        if self.needed <= self._memory:
            return [self._images]
        step = max(1, self._images * self._memory // self.needed)
        return [min(step, self._images - start) for start in range(0, self._images, step)]

    def prefix(self) -> int:
        """How many images the prefix takes at a time: an operator's input and output are there at once, and a copy."""
        largest = max((self._trace.nbytes([node], self._images) for node in self._down.suffix.prefix), default=1)
        room = max(0, self._memory - self._cached())
        return max(1, min(self._images, self._images * room // (3 * largest)))

    def jobs(self, on: Stretch, through_front: bool) -> int:
        """How many jobs run at a time, with all images in one part."""
        front = self._front + (self._contributions if self.keeps_contributions else 0) if through_front else 0
        fit = (self._memory - self._cached() - front) // self._pass(on)
        return max(1, min(fit, self._largest // max(on.sizes(self._trace, self._images))))

    def _pass(self, on: Stretch) -> int:
        """Bytes that one job takes: values are kept for the backward pass, and gradients are short-lived."""
        sizes = on.sizes(self._trace, self._images)
        faded = [node for node in on.nodes if node in self._down.by_output or node in self._down.riders]
        contribution = 0 if self.keeps_contributions or on is self._down.whole else self._front
        gradients = 3 * max(sizes) + self._trace.nbytes([*on.sources, *faded], self._images)
        return sum(sizes) + gradients + contribution

    def _cached(self) -> int:
        """Bytes that the prefix keeps for all passes."""
        return self._trace.nbytes(self._down.kept, self._images)
