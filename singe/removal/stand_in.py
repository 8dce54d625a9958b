"""What removal is tried on in place of a network: a copy that hides nothing behind its weights or its rounding."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.trace import Forward, answer
from ..memory import raise_shortage
from ..models.copies import copy_of
from ..models.numerics import alike
from ..models.outputs import leaves

log = logging.getLogger("singe")

_VANISHING = 1e-2
"""Parameters below this, relative to what they usually are, hide what they are multiplied with."""


@torch.no_grad()
def stand_in(model: nn.Module, inputs: Any, forward: Forward) -> tuple[nn.Module, Any]:
    """A copy of a network whose outputs every neuron counts in, and inputs for it.

    Whether removal equals masking does not depend on weights. But a fresh network multiplies whole branches by zero or
    by 1e-6, and in half precision errors of some percent pass for rounding. So parameters that vanish become random,
    and all are float64 if all of the network then computes in it; else float32, or what they are. Where it answers
    infinity for other values than before, or wildly, the parameters stay.

    Args:
        model: in eval mode; not modified.
        inputs: a few samples.
        forward: how the model is called.
    """
    finite = _finite(answer(copy_of(model), inputs, forward))
    for enliven, dtype in itertools.product((True, False), (torch.float64, torch.float32, None)):
        try:
            network, given = copy_of(model), inputs
            if enliven:
                _enliven(network)
            if dtype is not None:
                network = network.double() if dtype is torch.float64 else network.float()
                given = cast(inputs, dtype)
            if _works(network, given, forward, dtype, finite):
                return network, given
        except Exception as error:  # whatever the user's forward raises in another dtype
            raise_shortage(error)
    log.info("removal is tried on the network as it is: no copy in higher precision answers likewise")
    return model, inputs


def cast(inputs: Any, dtype: torch.dtype) -> Any:
    """Inputs, nested, with their floating point tensors in another dtype."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _enliven(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in network.parameters() if p.is_floating_point() and p.numel()):
        random = torch.rand(parameter.shape, generator=generator).to(parameter)
        if parameter.numel() == max(parameter.shape, default=1):  # scales, shifts: positive, since some take roots
            parameter.copy_(torch.where(parameter.abs() < _VANISHING, 0.5 + random / 2, parameter))
        elif parameter.abs().max() < _VANISHING * (usual := parameter[0].numel() ** -0.5):
            parameter.copy_((2 * random - 1) * usual)


def _works(
    network: nn.Module, inputs: Any, forward: Forward, dtype: torch.dtype | None, finite: Sequence[Tensor]
) -> bool:
    """Whether a network answers finite values where it should, steadily, and in nothing less precise than ``dtype``."""
    with _FloatingTypes() as seen:
        outputs = answer(network, inputs, forward)
    if dtype is not None and any(torch.finfo(d).eps > torch.finfo(dtype).eps for d in seen.found):
        return False
    nudged = copy_of(network)
    for parameter in (p for p in nudged.parameters() if p.is_floating_point()):
        parameter.mul_(1 + 4 * torch.finfo(parameter.dtype).eps)
    same = all(map(torch.equal, _finite(outputs), finite))
    return same and alike(answer(nudged, inputs, forward), outputs)


def _finite(outputs: Any) -> list[Tensor]:
    return [t.isfinite() for t in leaves(outputs) if isinstance(t, Tensor)]


class _FloatingTypes(TorchDispatchMode):
    """Notes in which floating-point types operators compute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {t.dtype for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()}
        return result
