"""The options of a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, get_args

import torch

from .. import values
from ..allocation.goal import Goal
from ..criteria import Criterion
from ..identity import of_function, of_object
from ..models.precision import Precision
from ..observer import Observer
from ..ranks import Ranks
from ..refit.compensation import Compensate
from ..scoring.selection import Refresh
from ..task import Task
from ..training.finetune import FineTune
from ..version import surroundings


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`singe.prune`, all but the model, the loader and the time that its analysis may take.

    Raises:
        TypeError, ValueError: bad values.
    """

    goal: Goal
    criterion: Criterion
    compensate: Compensate
    compensation_images: int
    refresh: Refresh
    finetune: FineTune | None
    images: int
    task: Task
    recalibrate_bn: int
    seed: int
    precision: Precision
    memory: int
    progress: bool
    checkpoint: str | os.PathLike[str] | None
    observer: Observer
    ranks: Ranks

    def __post_init__(self) -> None:
        values.choice("refresh", self.refresh, get_args(Refresh))
        values.choice("compensate", self.compensate, get_args(Compensate))
        if self.finetune is not None and not isinstance(self.finetune, FineTune):
            raise TypeError(f"expected finetune to be a singe.FineTune or None, got {type(self.finetune).__name__}")
        if not isinstance(self.progress, bool):
            raise TypeError(f"expected progress to be True or False, got {self.progress!r}")
        for name, least in (("images", 1), ("compensation_images", 2), ("memory", 1), ("recalibrate_bn", 0)):
            values.integer(name, getattr(self, name), least)
        values.seed(self.seed)
        if self.checkpoint is not None:
            values.path("checkpoint", self.checkpoint)

    def deciding(self) -> dict[str, Any]:
        """Those that decide the result of a run, as plain data."""
        task = self.task
        named = {"loss": of_function(task.objective), "forward": task.forward and of_function(task.forward)}
        return {
            **self.goal.described(), "criterion": of_object(self.criterion), "refresh": self.refresh,
            "compensate": self.compensate, "compensation_images": self.compensation_images,
            "finetune": repr(self.finetune), "images": self.images, "recalibrate_bn": self.recalibrate_bn,
            "seed": self.seed, "precision": self.precision, **named,
        }  # fmt: skip

    def described(self, device: torch.device) -> dict[str, str]:
        """What decided the run, and where it ran, for people to read."""
        deciding = self.deciding() | {"memory": self.memory}
        shown = {name: value if isinstance(value, str) else repr(value) for name, value in deciding.items()}
        return shown | surroundings(device)
