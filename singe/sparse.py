"""The result of a run on single weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import report
from .records import WeightRecord
from .removal import masks
from .result import Result
from .storage import saved


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SparseResult(Result[WeightRecord]):
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

    masks: dict[str, Tensor]
    weights_before: int
    weights_after: int

    @property
    def weights_removed(self) -> float:
        """Share of the weights that is masked, in [0, 1]: what rho asks for."""
        return 1 - self.weights_after / self.weights_before

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

    def _sizes(self) -> list[list[str]]:
        return [
            ["weights", f"{self.weights_before:,}", f"{self.weights_after:,}", f"-{self.weights_removed:.1%}"],
            ["parameters", f"{self.params_before:,}", f"{self.params_after:,}", f"-{self.params_removed:.1%}"],
        ]

    def _own_facts(self) -> dict[str, Any]:
        return {"weights": (self.weights_before, self.weights_after)}
