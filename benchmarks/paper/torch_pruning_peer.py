"""Torch-Pruning's criteria and surgery, with rankings that meet a share of the parameters.

Its own rankings do not: where all channels of a layer rank lowest, ``BasePruner`` leaves that layer whole, so that more
is left at a higher ratio, and magnitude over all layers never gets to 90 % of a ResNet-56. Here every layer keeps its
best channel instead, and all others go as they rank.
"""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from paper.recipe import SCORING, Baseline
from singe.sizes import count_parameters

IMAGES = 1024
"""Images that gradients are taken on; a run of ``singe.prune`` on a ResNet-56 draws 64 for each of 27 groups."""
RANKINGS = ("uniform", "global")
IMPORTANCES = {
    "L2": "GroupMagnitudeImportance",
    "Taylor": "GroupTaylorImportance",
    "Hessian": "GroupHessianImportance",
    "LAMP": "LAMPImportance",
    "FPGM": "FPGMImportance",
    "random": "RandomImportance",
}
"""Names of criteria -> their classes in Torch-Pruning, used with their defaults."""

Scores = dict[str, Tensor]
"""Name of a group's first layer -> a score for each of its channels."""


def prune(baseline: Baseline, importance: str, ranking: str, rate: float, seed: int) -> nn.Module:
    """A copy of the baseline without the lowest channels, with the number that comes closest to the share.

    Args:
        baseline: whose ``ignore`` and whose output layer are left whole.
        importance: one of :data:`IMPORTANCES`.
        ranking: "uniform", the same share of every layer, or "global", all channels in one order.
        rate: share of the parameters to remove.
        seed: of the images and of random scores.
    """
    x, y = baseline.batches(seed, SCORING).take(IMAGES)
    model = copy.deepcopy(baseline.model)
    with_gradients(model, importance, x, y)
    order = ranked(scores(model, importance, x[:1], baseline.ignore), ranking)
    for parameter in model.parameters():
        parameter.grad = None
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _gone(without(model, order[:middle], x[:1]), model) <= rate else (low, middle)
    ends = [without(model, order[:count], x[:1]) for count in (low, high)]
    return min(ends, key=lambda end: abs(_gone(end, model) - rate))


def with_gradients(model: nn.Module, importance: str, x: Tensor, y: Tensor) -> None:
    """Leaves in ``.grad`` what a criterion reads: the gradient of the mean loss, or the mean square of each sample's.

    The second is what ``GroupHessianImportance.accumulate_grad`` is for, which keeps the last sample's only.
    """
    parts = list(zip(x.split(32), y.split(32), strict=True))
    if importance == "Taylor":
        for part, labels in parts:
            (F.cross_entropy(model(part), labels, reduction="sum") / len(x)).backward()
    elif importance == "Hessian":
        parameters = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(model, values, (sample[None],)), label[None])

        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        for part, labels in parts:
            for name, each in vmap(grad(loss), in_dims=(None, 0, 0))(parameters, part, labels).items():
                parameters[name].grad += each.detach().square().sum(0) / len(x)


def scores(model: nn.Module, importance: str, x: Tensor, ignore: tuple[str, ...]) -> Scores:
    """A criterion's scores of every channel that may be removed."""
    import torch_pruning

    graph, criterion = _graph(model, x), getattr(torch_pruning.importance, IMPORTANCES[importance])()
    names = {module: name for name, module in model.named_modules()}
    with torch.no_grad():
        whole = _left_whole(model, ignore, classes=model(x).shape[1])
    return {names[group[0].dep.target.module]: criterion(group) for group in graph.get_all_groups(whole)}


def ranked(scores: Scores, ranking: str) -> list[tuple[str, int]]:
    """(layer, channel) of all channels but the best of each layer, in order of removal."""
    keys = []
    for number, (name, values) in enumerate(scores.items()):
        for place, channel in enumerate(values.argsort(stable=True).tolist()[:-1]):
            # of layers of one size one after the other loses a channel, so that any share can be met
            even = (place + (number + 0.5) / len(scores)) / len(values)
            keys.append((even if ranking == "uniform" else float(values[channel]), name, channel))
    return [(name, channel) for _, name, channel in sorted(keys, key=lambda key: key[0])]


def without(model: nn.Module, gone: list[tuple[str, int]], x: Tensor) -> nn.Module:
    """A copy that has lost some channels."""

    pruned = copy.deepcopy(model)
    graph = _graph(pruned, x)
    channels: dict[str, list[int]] = {}
    for name, channel in gone:
        channels.setdefault(name, []).append(channel)
    for name, indices in channels.items():
        layer = pruned.get_submodule(name)
        cut = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, cut, sorted(indices)).prune()
    return pruned


def _graph(model: nn.Module, x: Tensor) -> Any:
    import torch_pruning

    return torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)


def _left_whole(model: nn.Module, ignore: tuple[str, ...], classes: int) -> list[nn.Module]:
    named = [m for name, m in model.named_modules() if any(fnmatchcase(name, pattern) for pattern in ignore)]
    inside = [module for each in named for module in each.modules()]
    return inside + [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes]


def _gone(pruned: nn.Module, model: nn.Module) -> float:
    return 1 - count_parameters(pruned) / count_parameters(model)
