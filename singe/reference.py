"""The same mathematics in plain torch: slow, short, and the reference for everything fast in this package.

First come the twins of the native operators, with `singe.ops`'s signatures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from .criteria import (
    Criterion,
    FeatureRelevance,
    LossChange,
    Magnitude,
    PathCriterion,
    Random,
    Reconstruction,
    WeightCriterion,
    resolve,
    resolve_elementwise,
)
from .graph import batchnorm
from .graph.analysis import find_groups
from .graph.groups import Group, groups_of, in_layer_order, module_of, own_name
from .graph.riders import find_riders
from .graph.trace import Forward, Trace, trace
from .models.batches import Batch
from .models.copies import copy_of
from .models.names import first_name
from .models.weightnorm import plain_copy
from .models.wrappers import unwrapped
from .task import Loss, Task


def fade_neurons(z: Tensor, neuron: Tensor, t: Tensor, *, axis: int = 1) -> Tensor:
    """Twin of `singe.ops.fade_neurons`, with the neurons at axis 1 in the shapes at the ends of its lines."""
    z = z.movedim(axis, 1)  # [B, N, *S]
    jobs, neurons = neuron.size(0), z.size(1)
    rows = neuron[:, None, None] if neuron.dim() == 1 else neuron[:, :, None]  # [K, R, 1]
    scaled = (rows == torch.arange(neurons, device=z.device)).any(1)  # [K, N]
    factor = torch.where(scaled, t[:, None], 1.0)  # [K, N]
    factor = factor.reshape(jobs, 1, neurons, *[1] * (z.dim() - 2))  # [K, 1, N, 1...]
    compute = torch.promote_types(z.dtype, torch.float32)  # half types are multiplied in float32
    faded = z.to(compute) * factor.to(compute)  # [K, B, N, *S]
    return faded.to(z.dtype).flatten(0, 1).movedim(1, axis)  # [K*B, N, *S]


def fade_next(base: Tensor, contribution: Tensor, index: Tensor, t: Tensor, relu: bool = False) -> Tensor:
    """Twin of `singe.ops.fade_next`."""
    compute = torch.promote_types(base.dtype, torch.float32)
    none = contribution.new_zeros(1, *base.shape)  # [1, B, *S], what -1 refers to
    change = torch.cat([contribution, none]).to(compute)[index]  # [K, B, *S]
    factor = (t - 1).to(compute).reshape(-1, *[1] * base.dim())  # [K, 1, 1...]
    out = base.to(compute) + factor * change  # [K, B, *S]
    return (out.relu() if relu else out).to(base.dtype).flatten(0, 1)  # [K*B, *S]


def remove_neurons(base: Tensor, contribution: Tensor, index: Tensor) -> None:
    """Twin of `singe.ops.remove_neurons`."""
    compute = torch.promote_types(base.dtype, torch.float32)
    removed = contribution[index[index >= 0]].to(compute).sum(0)  # [B, *S]
    base.copy_(base.to(compute) - removed)  # [B, *S]


def neuron_grad_norm(
    x: Tensor,
    delta: Tensor,
    neuron: Tensor,
    node_weight: Tensor,
    weight_norm: Tensor,
    scores: Tensor,
    *,
    kernel_size: Sequence[int] = (),
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    p: float = 2.0,
) -> None:
    """Twin of `singe.ops.neuron_grad_norm`: autograd of a convolution with one output channel, job by job."""
    rank, batch = len(kernel_size), delta.size(1)
    window = {
        "stride": list(stride or [1] * rank),
        "padding": list(padding or [0] * rank),
        "dilation": list(dilation or [1] * rank),
    }
    channels = x.size(1) // groups
    for k, n in enumerate(neuron.tolist()):
        if n < 0 or delta.numel() == 0 or channels == 0:
            continue  # no gradient, or one of zeros
        images = x if x.size(0) == batch else x[k * batch : (k + 1) * batch]  # [B, C, *S_in]
        first = n // (weight_norm.numel() // groups) * channels
        seen = images[:, first : first + channels]  # [B, C/groups, *S_in]
        with torch.enable_grad():
            weight = x.new_zeros(1, channels, *kernel_size, requires_grad=True)  # [1, C/groups, *kernel]
            out = _affine(seen, weight, window)  # [B, 1, *S_out]
            (grad,) = torch.autograd.grad(out, weight, delta[k].unsqueeze(1))  # as weight
        norm = torch.linalg.vector_norm(grad.double(), p)  # []
        scores[n] += node_weight[k] * weight_norm[n] * norm


def _affine(x: Tensor, weight: Tensor, window: dict[str, list[int]]) -> Tensor:
    """The layer without its bias: linear for a weight without spatial axes, else the convolution of that rank."""
    rank = weight.dim() - 2
    if rank == 0:
        return F.linear(x, weight)
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    return convolution(x, weight, None, **window)


def score(
    model: nn.Module,
    batch: Batch,
    layer: str,
    *,
    criterion: str | Criterion = "integrated_gradient",
    loss: Loss | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """Twin of `singe.score`: the whole network, one neuron and one node at a time, `autograd.grad` to the weights."""
    model, chosen = unwrapped(model), resolve(criterion)
    if isinstance(chosen, (Reconstruction, FeatureRelevance)):
        raise ValueError(f"expected a criterion made of losses, gradients or weights, got {chosen}")
    work = plain_copy(model).eval()  # batch norms are folded in here
    task = Task(forward, loss)
    graph = trace(work, task.inputs(batch), task.call)
    if fold(work, graph):
        graph = trace(work, task.inputs(batch), task.call)  # in which every batch norm has a shift of its own
    layer = first_name(work, layer)
    groups = groups_of(layer, find_groups(graph))
    parts = [(group, _Literal(work, graph, group, batch, task).scores(chosen)) for group in groups]
    return in_layer_order(layer, parts)


def weight_scores(
    model: nn.Module,
    batch: Batch,
    parameter: str,
    *,
    criterion: str | Criterion = "integrated_gradient",
    loss: Loss | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """Twin of `singe.scoring.elementwise.WeightScorer`: the whole network for every node.

    Returns:
        float64, of the parameter's shape.
    """
    work, chosen = copy_of(unwrapped(model)).eval(), resolve_elementwise(criterion)
    judged, weight = _Judged(work, Task(forward, loss)), work.get_parameter(parameter).detach()
    if isinstance(chosen, Random):
        return torch.rand(weight.shape, dtype=torch.float64)
    if isinstance(chosen, Magnitude):
        return weight.abs().double()
    assert isinstance(chosen, PathCriterion)
    rule, total = chosen.rule(), torch.zeros_like(weight, dtype=torch.float64)
    for t, node_weight in zip(*(v.tolist() for v in rule.nodes), strict=True):
        faded = (t * weight).requires_grad_()
        with torch.enable_grad():
            value = torch.func.functional_call(judged, {f"model.{parameter}": faded}, (batch,))  # tied ones too
            (gradient,) = torch.autograd.grad(value, faded)
        total += node_weight * gradient.double().abs()
    return total * weight.abs() if rule.with_norm else total


@torch.no_grad()
def fold(model: nn.Module, graph: Trace) -> bool:
    """Folds every batch norm in place: y = a x + shift, with a moved into the layer in front where there is one.

    Each batch norm is left with mean 0, var 1 - eps, weight a (or 1) and bias shift: its bias is its whole shift.

    Returns:
        whether there are any.
    """
    live = graph.live(model)
    nodes = [n for n in graph.nodes if batchnorm.is_plain(n)]
    affine = {batchnorm.module(graph, n): batchnorm.affine(n, live) for n in nodes}
    for name, known in affine.items():
        norm: Any = model.get_submodule(name)
        norm.running_mean, norm.running_var = torch.zeros_like(known.shift), torch.full_like(known.shift, 1 - norm.eps)
        norm.weight, norm.bias = nn.Parameter(known.scale.clone()), nn.Parameter(known.shift)
    scaled: set[str] = set()
    for node in nodes:
        call: Any = node.args[0]
        weight = graph.parameter(call, 1, "weight")
        if weight is not None and batchnorm.of_weight(graph, weight).get(call) is node:
            name = batchnorm.module(graph, node)
            for tensor in (weight, graph.parameter(call, 2, "bias")):
                if tensor is not None and tensor not in scaled:
                    _scale_rows(model, tensor, affine[name].scale)
                    scaled.add(tensor)
            folded: Any = model.get_submodule(name)
            folded.weight.fill_(1)
    return bool(nodes)


def _scale_rows(model: nn.Module, tensor: str, scale: Tensor) -> None:
    """Multiplies the weights that write channel n by scale[n]."""
    module = model.get_submodule(module_of(tensor))
    rows = getattr(module, own_name(tensor)).data
    shape = [1] * rows.dim()
    shape[0] = -1
    if isinstance(module, _ConvTransposeNd) and rows.dim() > 1:
        rows = rows.unflatten(0, (module.groups, -1))  # [groups, C/groups, N/groups, ...]
        shape = [module.groups, 1, -1, *[1] * (rows.dim() - 3)]
    rows.mul_(scale.view(shape))


class _Judged(nn.Module):
    """A network and its loss as one module."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self._task = model, task

    def forward(self, batch: Batch) -> Tensor:
        return self._task(self.model, batch)


class _Literal:
    """The criteria for one group of a folded network."""

    def __init__(self, model: nn.Module, graph: Trace, group: Group, batch: Batch, task: Task) -> None:
        self._model, self._group, self._batch = model, group, batch
        self._judged = _Judged(model, task)
        named = (*model.named_parameters(), *model.named_buffers())  # tied ones once
        self._tensors = {name: tensor.detach() for name, tensor in named}
        riders = find_riders(graph, group, graph.nodes)
        added: set[str | None] = {tensor for rider in riders for tensor in rider.tensors}
        added |= {graph.parameter(call, 2, "bias") for weight in group.writers for call in graph.calls(weight)}
        self._theta = [s for s in group.slices if s.role == "writes" and self._fades(s.tensor, added)]

    def _fades(self, tensor: str, added: set[str | None]) -> bool:
        """Whether a tensor fades: weights, biases and anything else that is added do, scales do not."""
        if isinstance(self._model.get_submodule(module_of(tensor)), _NormBase):
            return tensor.endswith(".bias")
        return tensor in added or tensor in self._group.writers

    def scores(self, criterion: Criterion) -> Tensor:
        """float64 [n]."""
        every = range(self._group.size)
        if isinstance(criterion, LossChange):
            base = self._value(self._tensors)
            return torch.stack([self._value(self._faded([n], 0.0)) - base for n in every]).double().cpu()
        if isinstance(criterion, Random):
            return torch.rand(self._group.size, dtype=torch.float64)
        if isinstance(criterion, WeightCriterion):
            return torch.stack([self._of_weight(w, criterion) for w in self._group.writers]).sum(0)
        assert isinstance(criterion, PathCriterion)
        rule, total = criterion.rule(), torch.zeros(self._group.size, dtype=torch.float64)
        for n in every:
            norm = self._norms(self._tensors, n, criterion.p)  # [weight rows]
            for t, weight in zip(*(v.tolist() for v in rule.nodes), strict=True):
                gradient = self._gradient(self._faded([n] if rule.path == "neuron" else every, t))
                term = self._norms(gradient, n, criterion.p) * (norm if rule.with_norm else 1)
                total[n] += weight * float(term.sum())
        return total

    def _of_weight(self, weight: str, criterion: WeightCriterion) -> Tensor:
        """float64 [n]: a criterion's values for all rows of a weight at once, summed over those of each neuron."""
        rows = [self._rows(weight, self._tensors[weight], n) for n in range(self._group.size)]  # each [R, F]
        values = criterion.of_rows(torch.cat(rows).double())  # [n * R]
        return values.view(len(rows), -1).sum(1).cpu()

    def _faded(self, neurons: Iterable[int], t: float) -> dict[str, Tensor]:
        """All tensors, with the parts that ``neurons`` own scaled by t."""
        faded = dict(self._tensors)
        for s in self._theta:
            own = s.indices(torch.tensor(list(neurons))).to(faded[s.tensor].device)
            faded[s.tensor] = faded[s.tensor].clone()
            faded[s.tensor].movedim(s.dim, 0)[own] *= t
        return faded

    def _value(self, tensors: dict[str, Tensor]) -> Tensor:
        loss: Tensor = torch.func.functional_call(
            self._judged, {f"model.{name}": tensor for name, tensor in tensors.items()}, (self._batch,)
        )
        return loss

    def _gradient(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: tensors[name].clone().requires_grad_() for name in self._group.writers}
        with torch.enable_grad():
            grads = torch.autograd.grad(self._value({**tensors, **leaves}), list(leaves.values()))
        return dict(zip(leaves, grads, strict=True))

    def _norms(self, tensors: dict[str, Tensor], neuron: int, p: float) -> Tensor:
        """float64: the p-norm of each of a neuron's weight rows."""
        rows = [self._rows(w, tensors[w], neuron) for w in self._group.writers]  # each [R, F]
        return torch.cat([torch.linalg.vector_norm(r.double(), p, dim=1) for r in rows])

    def _rows(self, weight: str, value: Tensor, neuron: int) -> Tensor:
        """[R, F]: the parts of a weight that write one output channel of the neuron's each."""
        written, module = self._group.written(weight), self._model.get_submodule(module_of(weight))
        own = value.movedim(written.dim, 0)[written.indices(torch.tensor([neuron])).to(value.device)]
        if not isinstance(module, _ConvTransposeNd):
            return own.flatten(1)
        if written.dim == 0:  # one input channel for each group, [R, N/groups, ...]
            return own.flatten(0, 1).flatten(1)
        return own.unflatten(1, (module.groups, -1)).flatten(0, 1).flatten(1)  # [R, C, ...]
