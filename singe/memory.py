"""What passes may take: where the device turns out to have no room for that, they get smaller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from . import values

log = logging.getLogger("singe")

_LEAST = 1 << 30
_GPU_SHARE = 1 / 16

CPU_VALUE = 2 << 20
"""Bytes of one value for each thread of a CPU: larger ones leave the caches, and are freed every time."""

T = TypeVar("T")


def limit(memory: int | None, device: torch.device) -> int:
    """Bytes that the activations of a pass may take: ``memory``; by default 1 GiB, or if more a sixteenth of a GPU's.

    The share is of all that a GPU has, not of what is free, so that runs are divided in the same way every time.
    Refitting takes about twice as much.

    Raises:
        TypeError, ValueError: ``memory`` is no positive integer.
    """
    if memory is not None:
        return values.integer("memory", memory, 1)
    if device.type == "cuda":
        return max(_LEAST, int(_GPU_SHARE * torch.cuda.get_device_properties(device).total_memory))
    return _LEAST


class Memory:
    """What passes may take.

    Args:
        name: of what they are for, for the log.
        size: bytes.
        device: where they run.

    Attributes:
        size: what it has come down to.
    """

    def __init__(self, name: str, size: int, device: torch.device) -> None:
        self.size: int = size
        self._name, self._device = name, device

    def run(self, work: Callable[[], T], begin_anew: Callable[[], None] = lambda: None) -> T:
        """Runs ``work``, and again with half the memory each time that there is no room for its passes.

        Args:
            work: runs passes that take ``size`` bytes.
            begin_anew: lets go of what was made for larger ones.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_shortage(error) or self.size < 2:
                    raise
            self.size //= 2
            begin_anew()  # here, where the exception holds on to nothing any more
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # raises if a kernel failed, which can look like a shortage
                torch.cuda.empty_cache()
            log.warning("%s: out of memory, passes may take %d bytes from now on", self._name, self.size)


def raise_shortage(error: BaseException) -> None:
    """Raises an error of a device without room, which says nothing about the network that was tried."""
    if is_shortage(error):
        raise error


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that there is no room for a tensor; many are RuntimeErrors of torch's or our own."""
    words = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)
