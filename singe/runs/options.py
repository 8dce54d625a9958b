"""What a run is asked for."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..allocation.goal import Goal
from ..criteria import Criterion
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
    """The arguments of :func:`singe.prune`, all but the model, the loader and the time that its analysis may take."""

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

    def deciding(self) -> dict[str, Any]:
        """Those that decide what a run comes to, as plain data."""
        functions = {"loss": self.task.loss, "forward": self.task.forward}
        return {
            **asdict(self.goal), "criterion": repr(self.criterion), "refresh": self.refresh,
            "compensate": self.compensate, "compensation_images": self.compensation_images,
            "finetune": repr(self.finetune), "images": self.images, "recalibrate_bn": self.recalibrate_bn,
            "seed": self.seed, "precision": self.precision,
            **{key: f and getattr(f, "__qualname__", type(f).__name__) for key, f in functions.items()},
        }  # fmt: skip

    def described(self, device: torch.device) -> dict[str, str]:
        """What decided the run, and where it ran, for people to read."""
        deciding = self.deciding() | {"memory": self.memory}
        shown = {name: value if isinstance(value, str) else repr(value) for name, value in deciding.items()}
        return shown | surroundings(device)
