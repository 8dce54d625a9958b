"""What removal is tried on in place of a network: a copy that hides nothing behind its weights or its rounding."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..graph.trace import Forward, answer
from ..models.copies import copy_of
from ..models.outputs import leaves

_VANISHING = 1e-2
"""Parameters below this, relative to what they usually are, hide what they are multiplied with."""


@torch.no_grad()
def stand_in(model: nn.Module, inputs: Any, forward: Forward) -> tuple[nn.Module, Any]:
    """A copy of a network whose outputs every neuron counts in, and inputs for it.

    Whether removal equals masking does not depend on weights. But a fresh network multiplies whole branches by zero or
    by 1e-6, and in half precision errors of some percent pass for rounding. So parameters that vanish become random,
    and all are float64 if all of the network then computes in it; else float32, or what they are.

    Args:
        model: in eval mode; not modified.
        inputs: a few samples.
        forward: how the model is called.
    """
    for dtype in (torch.float64, torch.float32, None):
        with contextlib.suppress(Exception):  # whatever the user's forward raises in another dtype
            network, given = _enlivened(copy_of(model)), inputs
            if dtype is not None:
                network = network.double() if dtype is torch.float64 else network.float()
                given = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)  # noqa: B023
            if _works(network, given, forward, dtype):
                return network, given
    return model, inputs


def _enlivened(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in network.parameters() if p.is_floating_point() and p.numel()):
        random = torch.rand(parameter.shape, generator=generator).to(parameter)
        if parameter.numel() == max(parameter.shape, default=1):  # scales, shifts: positive, since some take roots
            parameter.copy_(torch.where(parameter.abs() < _VANISHING, 0.5 + random / 2, parameter))
        elif parameter.abs().max() < _VANISHING * (usual := parameter[0].numel() ** -0.5):
            parameter.copy_((2 * random - 1) * usual)
    return network


def _works(network: nn.Module, inputs: Any, forward: Forward, dtype: torch.dtype | None) -> bool:
    """Whether the outputs are finite, and nothing on the way to them is less precise than ``dtype``."""
    with _FloatingTypes() as seen:
        outputs = answer(network, inputs, forward)
    finite = all(bool(t.isfinite().all()) for t in leaves(outputs) if isinstance(t, Tensor))
    return finite and (dtype is None or all(torch.finfo(d).eps <= torch.finfo(dtype).eps for d in seen.found))


class _FloatingTypes(TorchDispatchMode):
    """Notes in which floating-point types operators compute."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found |= {t.dtype for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()}
        return result
