"""The result of a run on single weights."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from . import report
from .records import WeightRecord
from .removal import masks
from .report import Facts
from .storage import saved
from .table import table


@dataclass(frozen=True, eq=False, repr=False)
class SparseResult:
    """A network with single weights masked, and how it came about; ``print`` it for a summary.

    Attributes:
        model: of the same class and shapes; the pruned weights have masks of ``torch.nn.utils.prune``: NAME is the
            product of the parameter NAME_orig, which holds zeros where the mask does, and the buffer NAME_mask, and so
            stays sparse in any further training. Train mode and requires_grad are as in the model given.
        masks: parameter name -> bool tensor of its shape, True for weights that stay; tied ones under the first name.
        weights_before, weights_after: single weights of convolutions and linear layers, tied ones counted once; and
            those of them that are not masked.
        params_before, params_after: all parameters, likewise.
        loss_before, loss_after: on one batch of calibration samples, in eval mode.
        history: one record per pruned weight tensor, in order.
        frozen: the weight tensors that were left whole -> why.
        evaluation_before, evaluation_after: what ``evaluate`` returned for the unpruned and the pruned network; None
            without it.
        settings: what decided the run and where it ran, as text.
        seconds: activity -> the time it took.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    weights_before: int
    weights_after: int
    params_before: int
    params_after: int
    loss_before: float
    loss_after: float
    history: list[WeightRecord]
    frozen: dict[str, str]
    evaluation_before: float | None = None
    evaluation_after: float | None = None
    settings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def weights_removed(self) -> float:
        """Share of the weights that is masked, in [0, 1]: what rho asks for."""
        return 1 - self.weights_after / self.weights_before

    @property
    def params_removed(self) -> float:
        """Share of all parameters that is masked, in [0, 1]."""
        return 1 - self.params_after / self.params_before

    def make_permanent(self) -> None:
        """Takes the masks off the model, in place: parameters are plain again and zeros are no longer held.

        Names and classes are then those of the model given. A second call does nothing.
        """
        if masks.are_on(self.model, self.masks):
            masks.take_off(self.model, self.masks)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``masks.safetensors``, ``model.safetensors`` and ``report.json`` into a directory, which is created.

        See ``singe.load`` and ``singe.report.write_report``.
        """
        saved.save_masked(self.model, self.masks, directory)
        report.save(self._facts(), directory)

    def report(self, directory: str | os.PathLike[str]) -> Path:
        """Writes ``report.html`` and its plots; see :meth:`singe.PruneResult.report`."""
        return report.write(self._facts(), directory)

    def _facts(self) -> Facts:
        return Facts(
            model=type(self.model).__name__,
            parameters=(self.params_before, self.params_after), weights=(self.weights_before, self.weights_after),
            loss=(self.loss_before, self.loss_after), evaluation=(self.evaluation_before, self.evaluation_after),
            history=tuple(self.history), frozen=self.frozen, settings=self.settings, seconds=self.seconds,
        )  # fmt: skip

    def __repr__(self) -> str:
        rows = [
            ["weights", f"{self.weights_before:,}", f"{self.weights_after:,}", f"-{self.weights_removed:.1%}"],
            ["parameters", f"{self.params_before:,}", f"{self.params_after:,}", f"-{self.params_removed:.1%}"],
            ["loss", *(f"{x:.4f}" if math.isfinite(x) else "-" for x in (self.loss_before, self.loss_after)), ""],
        ]
        if self.evaluation_before is not None and self.evaluation_after is not None:
            rows.append(["evaluation", f"{self.evaluation_before:.4g}", f"{self.evaluation_after:.4g}", ""])
        frozen = "".join(f"\nleft whole: {name} ({reason})" for name, reason in self.frozen.items())
        return table(["", "before", "after", "change"], rows) + frozen
