"""The processes of a run under torch.distributed: what they sum, what one sends the others, and that they agree."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from .digest import digest

log = logging.getLogger("singe")

MEETING = timedelta(minutes=5)
"""How long processes wait for all others to make the same call."""

_DIGEST = 32
"""Bytes."""


class Ranks:
    """One process among those that share a run; one that is alone by default, where nothing is communicated.

    All ranks have to call the same methods in the same order.

    Args:
        group: of gloo, between all of them; values travel through memory of the CPU.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        sent: bytes of the values that this process has sent so far; up to twice as many go over the wire.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.sent = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all: it writes, shows progress and calls back."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Which of ``count`` items in a row are this rank's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over the ranks, the same bits on all of them; on the device of ``values``."""
        if self.group is None:
            return values
        total = self._handed(values)
        with self.together():
            dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def from_first(self, values: Tensor) -> Tensor:
        """What the first rank has, of the same shape and dtype; on the device of ``values``."""
        if self.group is None or not values.numel():
            return values
        told = self._handed(values)
        with self.together():  # as bytes: any dtype will do
            dist.broadcast(told.view(-1).view(torch.uint8), group=self.group, group_src=0)
        return told.to(values.device)

    def number(self, value: float | None) -> float | None:
        """The first rank's number; None where all have none."""
        if value is None:
            return None
        return float(self.from_first(torch.tensor(value, dtype=torch.float64, device="cpu")))

    def wait(self) -> None:
        """Returns when all are here."""
        if self.group is not None:
            with self.together():
                dist.barrier(self.group)

    def differing(self, text: str, tensors: Mapping[str, Tensor] | None = None) -> list[int]:
        """The ranks whose text or tensors are not those of the first one, by their SHA-256; the same answer on all."""
        if self.group is None:
            return []
        own = torch.frombuffer(bytearray.fromhex(digest(text, tensors or {})), dtype=torch.uint8)
        digests = torch.empty(self.size, _DIGEST, dtype=torch.uint8)
        self.sent += _DIGEST
        with self.together():
            dist.all_gather(list(digests.unbind()), own, group=self.group)
        return (digests != digests[0]).any(1).nonzero().flatten().tolist()

    def check_same(self, what: str, text: str) -> None:
        """Raises ValueError on all ranks unless all were given the same."""
        if others := self.differing(text):
            raise ValueError(f"expected the same {what} on all ranks, but ranks {others} have others than rank 0")

    def check_decision(self, part: str, decided: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError on all ranks unless all have decided the same about a part of the network."""
        if others := self.differing(part, decided):
            raise RuntimeError(f"ranks {others} have removed others of {part} than rank 0; please report this model")

    def synchronise(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives all ranks the first one's values, in place, where any has others: machines may round differently."""
        others = self.differing("", tensors)
        if others:
            log.debug("values on ranks %s are those of rank 0 from here on", others)
            with torch.no_grad():
                for name in sorted(tensors):
                    tensors[name].copy_(self.from_first(tensors[name]))

    def _handed(self, values: Tensor) -> Tensor:
        """A copy to communicate in."""
        self.sent += values.numel() * values.element_size()
        return values.detach().to("cpu", copy=True).contiguous()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Explains failures of operations that all ranks take part in, such as averaging gradients."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            raise RuntimeError(
                f"rank {self.rank} of {self.size} has lost another rank: it died, raised an error of its own, which "
                "is in its output, or was not heard from for too long"
            ) from error


ALONE = Ranks()


@contextmanager
def meeting() -> Iterator[Ranks]:
    """All processes of ``torch.distributed``'s default group, if there is one; otherwise this one alone.

    A process that leaves, with or without an error, ends the operation that the others are waiting for.

    Raises:
        RuntimeError: not all of them come within five minutes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if dist.is_available() and dist.is_torchelastic_launched():
            log.warning("torch.distributed is not initialised: each process that was launched prunes alone")
        yield ALONE
        return
    if dist.get_world_size() == 1:
        yield ALONE
        return
    met, ranks = [_met()], Ranks()
    try:
        met.append(dist.new_group(backend="gloo"))
        ranks = Ranks(met[-1])
        yield ranks
        ranks.wait()  # nobody closes a connection that others still use
    finally:
        while met:
            dist.destroy_process_group(met.pop())
        ranks.group = None
        gc.collect()  # sockets close with the last reference, which notifies the others


def _met() -> dist.ProcessGroup:
    """A group that forms only if every process joins soon; later operations may take longer."""
    try:
        return dist.new_group(backend="gloo", timeout=MEETING)
    except RuntimeError as error:
        raise RuntimeError(
            f"expected all {dist.get_world_size()} ranks to make this call, but not all came within "
            f"{MEETING.total_seconds():.0f} s, or one died"
        ) from error
