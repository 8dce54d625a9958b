"""Every network of the zoo, looked into and pruned."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from pruning import masked
from small_zoo import ZOO, Entry
from small_zoo.attention import FusedAttention, SeparateAttention
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

import singe
from singe.allocation.cost import parameter_cost
from singe.allocation.goal import left_alone
from singe.graph.groups import Group, module_of
from singe.graph.trace import Trace, answer, named_tensors, plain_call, trace
from singe.models.weightnorm import plain_copy
from singe.removal.trial import difference
from singe.survey import Survey, survey
from singe.task import Task

every_network = pytest.mark.parametrize("name", ZOO)
OF_EVERY_KIND = (
    "densenet", "googlenet", "shufflenet v2", "mobilenet v2", "convnext", "vit separate", "swin", "hrnet", "detector",
    "demucs", "gru", "siamese", "weight norm", "group norm",
)  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """A network's graph and what was found in it."""

    graph: Trace
    survey: Survey


@cache
def findings(name: str) -> Findings:
    entry, model = ZOO[name], plain_copy(ZOO[name].make())
    call = entry.forward or plain_call
    graph = trace(model, entry.inputs(), call)
    found = survey(model, graph, entry.inputs(), Task(entry.forward), lambda groups: left_alone(model, groups, ()))
    return Findings(graph, found)


def writer(group: Group) -> str:
    """The module that a group is named after, or the parameter itself where that is the model's own."""
    return module_of(group.writers[0]) or group.writers[0]


def batch_of(entry: Entry) -> Any:
    """A batch as ``singe.prune`` takes it."""
    x = entry.inputs()
    return x if entry.forward else (x, torch.zeros(len(x), dtype=torch.int64))


def size_of_outputs(outputs: Any, batch: Any) -> Tensor:
    return sum(t.square().mean() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))


@every_network
def test_what_the_graph_calls_free_passes_the_trial(name):
    tried = {module for module, reason in findings(name).survey.whole.items() if reason.startswith("trial")}
    assert tried <= {*ZOO[name].doubtful, *ZOO[name].frozen}


@every_network
def test_what_must_be_prunable_is(name):
    found: dict[str, int] = defaultdict(int)
    for group in findings(name).survey.able:
        found[writer(group)] += group.size
    expected = ZOO[name].free
    assert {module: found[module] for module in expected} == expected


@every_network
def test_what_must_be_frozen_is_with_a_reason_of_that_kind(name):
    found = findings(name).survey
    prunable = {writer(g) for g in found.able}
    reasons: dict[str, list[str]] = defaultdict(list)
    for group in found.groups:
        reasons[writer(group)] += [found.whole[group.name]] if group.name in found.whole else []
    for module, reason in found.unfollowed.items():
        reasons[module].append(reason)
    for module, kind in ZOO[name].frozen.items():
        plain_words = [r.lower().replace("_", "").replace(" ", "") for r in reasons[module]]
        assert plain_words and all(kind in r for r in plain_words), (module, reasons[module])
        assert module not in prunable


def exported_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has ``singe.prune`` run the graph that is there for the whole network, and export only what is pruned."""
    shapes = {n: t.shape for n, t in named_tensors(plain_copy(ZOO[name].make())).items()}

    def graph_of(model: nn.Module, *rest: Any) -> Trace:
        whole = {n: t.shape for n, t in named_tensors(model).items()} == shapes
        return findings(name).graph if whole else trace(model, *rest)

    monkeypatch.setattr("singe.runs.workspace.trace", graph_of)


@pytest.mark.parametrize(("name", "share"), [*zip(ZOO, cycle([0.3, 0.6]))])
def test_a_pruned_network_is_the_masked_one_and_trains(name, share, monkeypatch):
    exported_once(name, monkeypatch)
    entry = ZOO[name]
    model, batch, call = entry.make(), batch_of(entry), entry.forward or plain_call
    prunable = findings(name).survey.able
    assert prunable
    cost = parameter_cost(plain_copy(model), prunable)
    reach = cost.gone([g.size - 1 for g in prunable]) / cost.total
    result = singe.prune(
        model, [batch], share * reach, criterion="magnitude", finetune=None, images=4, progress=False,
        loss=size_of_outputs, forward=entry.forward, allocation="uniform", compensate="none",
    )  # fmt: skip
    assert result.plan.removals
    networks = masked(model, result.plan), result.model
    assert difference(*(answer(network, entry.inputs(), call) for network in networks)) is None
    assert_attributes_agree(result.model)
    assert_trains(result.model, entry)


@pytest.mark.parametrize("name", OF_EVERY_KIND)
def test_the_defaults_of_prune_are_for_every_kind_of_network(name, monkeypatch):
    exported_once(name, monkeypatch)
    entry = ZOO[name]
    model, x = entry.make(), entry.inputs()
    result = singe.prune(
        model, [batch_of(entry)], 0.15, finetune=None, images=4, compensation_images=8, progress=False,
        loss=size_of_outputs, forward=entry.forward,
    )  # fmt: skip
    assert result.plan.removals
    assert not any(record.uncompensated for record in result.history)
    assert all(v.isfinite().all() for v in pytree.tree_leaves(answer(result.model, x, entry.forward or plain_call)))
    assert_trains(result.model, entry)


def assert_attributes_agree(model: nn.Module) -> None:
    """Every width that a module keeps is that of its tensors."""
    for name, module in model.named_modules():
        for kept, actual in widths(module):
            assert kept == actual, (name, type(module).__name__)


def widths(module: nn.Module) -> list[tuple[Any, Any]]:
    """What a module says about its shapes, and what its tensors say."""
    if isinstance(module, _ConvNd):
        channels = [module.out_channels, module.in_channels]
        channels[1 if not module.transposed else 0] //= module.groups
        shape = channels[::-1] if module.transposed else channels
        return [((*shape, *module.kernel_size), tuple(module.weight.shape))]
    if isinstance(module, nn.Linear):
        return [((module.out_features, module.in_features), tuple(module.weight.shape))]
    if isinstance(module, _NormBase):
        tensors = (module.weight, module.bias, module.running_mean, module.running_var)
        return [((module.num_features,), tuple(t.shape)) for t in tensors if t is not None]
    if isinstance(module, nn.GroupNorm):
        return [((module.num_channels,), tuple(module.weight.shape))] if module.affine else []
    if isinstance(module, nn.LayerNorm):
        return [(tuple(module.normalized_shape), tuple(module.weight.shape))]
    if isinstance(module, nn.PReLU):
        return [(module.num_parameters, len(module.weight))]
    if isinstance(module, (FusedAttention, SeparateAttention)):
        return [(module.num_heads * module.head_dim, module.proj.in_features)]
    return []


def assert_trains(model: nn.Module, entry: Entry) -> None:
    """A step in train mode gives a gradient to every parameter that is used there."""
    model, batch = copy.deepcopy(model).train(), batch_of(entry)
    whole = entry.make().train()
    for network in (whole, model):
        outputs = answer(network, entry.inputs(), entry.forward or plain_call)
        size_of_outputs(outputs, batch).backward()
    used = {n for n, p in whole.named_parameters() if p.grad is not None}
    assert {n for n, p in model.named_parameters() if p.grad is not None} == used
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
