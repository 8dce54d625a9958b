"""What a run on single weights hands back."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import Tensor, nn

from . import masks, saved
from .report import table


@dataclass(frozen=True)
class WeightRecord:
    """What happened to one weight tensor.

    Attributes:
        weight: its qualified name.
        size: how many single weights it holds.
        removed: how many of them were masked.
        loss_start: loss on the layer's own batch before.
        loss_removed: after masking, before fine-tuning.
        loss_end: after fine-tuning.
        seconds_scoring: time spent choosing weights.
        seconds_tuning: time spent fine-tuning.
    """

    weight: str
    size: int
    removed: int
    loss_start: float
    loss_removed: float
    loss_end: float
    seconds_scoring: float
    seconds_tuning: float


@dataclass(frozen=True, eq=False)
class SparseResult:
    """A network without some of its weights, and how it came about; ``print`` it for a summary.

    Attributes:
        model: of the same class and shapes; the pruned weights carry masks of ``torch.nn.utils.prune``: NAME is the
            product of the parameter NAME_orig, which holds zeros where the mask does, and the buffer NAME_mask, and so
            stays sparse in any further training. Train mode and requires_grad are as in the model given.
        masks: parameter name -> bool tensor of its shape, True for weights that stay; tied ones under the first name.
        weights_before, weights_after: single weights of convolutions and linear layers, tied ones counted once; and
            those of them that are not masked.
        params_before, params_after: all parameters, likewise.
        loss_before, loss_after: on one batch of calibration samples, in eval mode.
        history: one record per pruned weight tensor, in order.
        frozen: the weight tensors that were left whole -> why.
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

    @property
    def weights_removed(self) -> float:
        """Share of the weights that is masked, in [0, 1]: what rho asks for."""
        return 1 - self.weights_after / self.weights_before

    @property
    def params_removed(self) -> float:
        """Share of all parameters that is masked, in [0, 1]."""
        return 1 - self.params_after / self.params_before

    def make_permanent(self) -> None:
        """Takes the masks off the model, in place: plain parameters that hold the zeros, with nothing to keep them so.

        Names and classes are then those of the model given. Does nothing a second time.
        """
        if masks.are_on(self.model, self.masks):
            masks.take_off(self.model, self.masks)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``masks.safetensors`` and ``model.safetensors`` into a directory; see ``singe.load``."""
        saved.save_masked(self.model, self.masks, directory)

    def __str__(self) -> str:
        rows = [
            ["weights", f"{self.weights_before:,}", f"{self.weights_after:,}", f"-{self.weights_removed:.1%}"],
            ["parameters", f"{self.params_before:,}", f"{self.params_after:,}", f"-{self.params_removed:.1%}"],
            ["loss", f"{self.loss_before:.4f}", f"{self.loss_after:.4f}", ""],
        ]
        frozen = "".join(f"\nleft whole: {name} ({reason})" for name, reason in self.frozen.items())
        return table(["", "before", "after", "change"], rows) + frozen
