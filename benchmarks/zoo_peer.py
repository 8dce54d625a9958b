"""A model of the zoo through Torch-Pruning, as its documents and examples say."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree
from zoo_checks import Inputs, described, shapes, training_problem
from zoo_models import lively

from singe.sizes import count_parameters

RATIOS = (0.3, 0.6)


@dataclass(frozen=True)
class Outcome:
    """The outcome.

    Attributes:
        building, pruning: seconds to build the pruner, and of its one step.
        params: share that is gone.
        problem: the first thing that is wrong with the result; None if nothing is.
    """

    building: float
    pruning: float
    params: float
    problem: str | None


def measure(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each of :data:`RATIOS` (it, an :class:`Outcome`), or {"problem": ...} where pruning itself failed."""
    # as in its examples for timm: only plain attention can be followed
    os.environ["TIMM_FUSED_ATTN"] = "0"
    for ratio in RATIOS:
        try:
            yield str(ratio), asdict(pruned(name, ratio))
        except Exception as error:  # a library at fault is a finding
            yield str(ratio), {"problem": described(error)}


def pruned(name: str, ratio: float) -> Outcome:
    """Prunes a share of all channels by magnitude, layer by layer, and checks the result."""
    import torch_pruning

    model, inputs = lively(name)
    original, outputs = copy.deepcopy(model), shapes(model, inputs)
    heads = _attention_heads(model)
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model, inputs if len(inputs) > 1 else inputs[0], torch_pruning.importance.MagnitudeImportance(),
        global_pruning=False, pruning_ratio=ratio, ignored_layers=_classifiers(model, {s[1] for s in outputs}),
        num_heads=heads, round_to=_tokens_round_to(model), in_channel_groups={}, out_channel_groups={},
        output_transform=pytree.tree_leaves,
    )  # fmt: skip
    built = time.perf_counter()
    pruner.step()
    done = time.perf_counter()
    _follow(model, heads)
    gone = 1 - count_parameters(model) / count_parameters(original)
    problem = _forward_problem(model, inputs, outputs) or training_problem(model, inputs, original)
    return Outcome(built - start, done - built, gone, problem or (None if gone else "nothing was removed"))


def _classifiers(model: nn.Module, widths: set[int]) -> list[nn.Module]:
    """The layers that compute the network's outputs, found by their width, and attention's own output layers."""
    last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features in widths]
    last += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels in widths]
    return last + [m for m in model.modules() if isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)]


def _attention_heads(model: nn.Module) -> dict[nn.Module, int]:
    """For timm's attention: the layer that computes queries, keys and values -> its heads."""
    return {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "num_heads") and isinstance(_qkv(m), nn.Linear)}


def _qkv(module: nn.Module) -> nn.Module | None:
    return getattr(module, "qkv", None)


def _tokens_round_to(model: nn.Module) -> int | None:
    """torchvision's attention needs a width that its heads divide."""
    heads = [m.num_heads for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    return max(heads, default=None)


def _follow(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """Updates widths that models store as attributes, as users are told to."""
    for module in model.modules():
        if _qkv(module) in heads:
            module.num_heads = heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels


def _forward_problem(model: nn.Module, inputs: Inputs, expected: list[tuple[int, ...]]) -> str | None:
    try:
        found = shapes(model, inputs)
    except Exception as error:  # whatever a broken model raises
        return described(error)
    return None if found == expected else f"outputs of shape {found} instead of {expected}"
