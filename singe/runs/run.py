"""What runs of both kinds have in common: a workspace, what is decided, and a checkpoint of how far they have come."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from ..digest import digest
from ..graph.trace import named_tensors
from ..storage.checkpoint import Checkpoint, fingerprint
from ..storage.progress import Progress
from .workspace import Workspace

log = logging.getLogger("singe")


class Run:
    """One call of :func:`singe.prune`: what has been decided, and what has been done.

    Args:
        space: what is worked on; analysed here.

    Attributes:
        space: the same.
        todo: the groups, or weight tensors, that are pruned, in order, and how much of each.
        frozen: names of what is left whole -> why.
        resumes: whether it continues from a checkpoint.
    """

    kind: ClassVar[type[Progress]]
    """Of what the run's progress is."""

    structured: ClassVar[bool]
    """Whether whole neurons are removed."""

    space: Workspace
    todo: list[tuple[Any, int]]

    def __init__(self, space: Workspace) -> None:
        self.space, self.todo, self.frozen = space, [], dict[str, str]()
        self._checkpoint = self._opened()
        resumed = self._resumed()
        self.resumes = resumed is not None
        space.begin(resumed or self.kind(space.options.memory, self._samples()))

    def decided(self, able: Mapping[tuple[str, int], Any]) -> list[tuple[Any, int]]:
        """What is to be done, by the counts that were found now or when the run began.

        Args:
            able: (name, size) -> a group, or weight tensor, that can be pruned.

        Raises:
            ValueError: a checkpoint tells of others.
        """
        counts = self.space.progress.counts
        other = [name for name, size, _ in counts if (name, size) not in able]
        if other:
            raise ValueError(f"expected the model to have what the checkpoint names, found no {', '.join(other)}")
        return [(able[name, size], count) for name, size, count in counts]

    # -- the checkpoint --------------------------------------------------------------------------------------

    def _opened(self) -> Checkpoint | None:
        space = self.space
        if space.options.checkpoint is None:
            return None
        trained = [name for name, p in space.given.named_parameters() if p.requires_grad]
        model = digest(json.dumps([trained, space.still]), named_tensors(space.given))
        call = {"structured": self.structured, **space.options.deciding(), "model": model}
        return Checkpoint(space.options.checkpoint, call)

    def _resumed(self) -> Progress | None:
        """The progress to continue from, if any, which all ranks have to see."""
        found = self._checkpoint.read(self.kind) if self._checkpoint is not None else None
        told = "" if found is None else json.dumps(found.to_json())
        self.space.ranks.check_same("checkpoint (in a directory that all share)", told)
        return found

    def _samples(self) -> str:
        return fingerprint(self.space.probe, self.space.stream.batch_length)

    def _begin(self) -> None:
        """Goes where a checkpoint says that the run was, or writes the first, and tells of what is done."""
        space = self.space
        if self.resumes:
            self.resume()
        elif self._checkpoint is not None and space.ranks.first:  # what cannot be written is found out before any work
            self._checkpoint.write(space.progress, space.model, None, {})
        for record in space.progress.history:
            space.options.observer.tell(record)

    def resume(self) -> None:
        """Puts everything where the checkpoint says that it was."""
        progress = self.space.progress
        if self._samples() != progress.samples:
            log.warning("the loader's first samples, or its batches, are not what they were: the result may differ")
        what = "groups" if self.structured else "layers"
        log.info(
            "the run continues after %d of %d %s and %d steps of the training that follows them",
            len(progress.history), len(self.todo), what, progress.tuned,
        )  # fmt: skip

    def _tune_after(self) -> None:
        """Fine-tunes after all else, and saves how far that has come."""
        tuner = self.space.tuner
        if tuner is not None and tuner.when == "after":
            self.space.tune_after(len(self.todo), self._save)

    def _save(self) -> None:
        """Leaves a checkpoint, if asked to; a run does not end for want of room on a disk."""
        space = self.space
        if self._checkpoint is None or not space.ranks.first:
            return
        try:
            self._checkpoint.write(space.progress, space.model, self._optimizer, self._masks)
        except OSError as error:
            log.warning("no checkpoint was written, the last one stays: %s", error)

    @property
    def _optimizer(self) -> Optimizer | None:
        tuner = self.space.tuner
        return None if tuner is None else tuner.optimizer

    @property
    def _masks(self) -> Mapping[str, Tensor]:
        """What a checkpoint has to hold beside the model."""
        return {}
