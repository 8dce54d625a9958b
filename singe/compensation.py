"""What reads pruned neurons is refitted, so that the network goes on as the unpruned one: no labels, no gradients."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .batches import Batch, length, tensors
from .budget import CPU_VALUE
from .graph import batchnorm
from .graph.groups import Group, module_of
from .graph.nodes import ancestors
from .graph.point import Point, find_point
from .graph.trace import Env, Trace, named_tensors
from .plan import Plan
from .task import Task

log = logging.getLogger("singe")

Compensate = Literal["none", "mean", "least_squares"]

RIDGE = 1e-4
"""What a change of the weights costs, as a share of the mean square of the inputs."""

_EQUATIONS = 64
"""For each unknown of an output channel, as far as there are so many; more make no difference that can be seen."""


class Compensator:
    """Refits the readers of a group after neurons of it are gone.

    A reader's weights W and bias b become those that minimise |X W + b - Z|^2 + lambda |W - W_0|^2. X is what it now
    reads, and Z what it would have to put out for the network to hold behind it what the unpruned one holds there:
    behind its batch norm and, in a residual block, in the sum with the shortcut, as the latter is now.

    Args:
        original: the unpruned network in eval mode.
        trace: of it.
        batch: samples to look at.
        task: how the network is called.
        how: "mean" changes biases alone, "least_squares" weights too.
        memory: bytes that activations and equations may take, roughly.
    """

    def __init__(
        self, original: nn.Module, trace: Trace, batch: Batch, task: Task, how: Compensate, memory: int
    ) -> None:
        self._original, self._unpruned, self._how, self._memory = original, trace, how, memory
        self._inputs = task.inputs(batch)

    def refit(self, model: nn.Module, trace: Trace, group: Group, plan: Plan) -> dict[str, str]:
        """Refits what reads a group, in execution order.

        Args:
            model: pruned, changed in place.
            trace: of it as it is.
            group: with slices of any coordinates.
            plan: what of the unpruned network is gone.

        Returns:
            the readers that stay as they are -> why.
        """
        refused: dict[str, str] = {}
        removed, sizes = plan.removed(), {name: len(t) for name, t in named_tensors(self._original).items() if t.dim()}
        for weight in dict.fromkeys(s.tensor for s in group.slices if s.role == "reads"):
            kept = torch.ones(sizes[weight], dtype=torch.bool)
            kept[removed.get((weight, 0), torch.empty(0, dtype=torch.int64))] = False
            reason = self._refit(model, trace, weight, kept)
            if reason is not None:
                refused[module_of(weight)] = reason
                log.info("%s is not compensated: %s", module_of(weight), reason)
        return refused

    @torch.no_grad()
    def _refit(self, model: nn.Module, trace: Trace, weight: str, kept: Tensor) -> str | None:
        now, then = find_point(trace, weight), find_point(self._unpruned, weight)
        if isinstance(now, str) or isinstance(then, str):
            return now if isinstance(now, str) else str(then)
        known = named_tensors(model)
        parameter, offset = known[weight], _offset(trace, now, known)
        trained = any(p.requires_grad for p in model.parameters())
        if trained and not parameter.requires_grad:
            return "its weight is not to be trained"
        if trained and offset is not None and isinstance(offset[0], nn.Parameter) and not offset[0].requires_grad:
            offset = None
        if self._how == "mean" and offset is None:
            return "it has no bias to change, and no batch norm follows it"
        x, missing = self._equations(now, then, model, trace, kept)
        parts = x.shape[1] * x.shape[2] // parameter[0].numel()  # the groups of a convolution
        if self._how == "mean":
            x = x[:, :0]
        fits = [
            least_squares(own.flatten(1), wanted, offset is not None)
            for own, wanted in zip(x.tensor_split(parts, 1), missing.chunk(parts, 1), strict=True)
        ]
        if self._how == "least_squares":
            parameter += torch.cat([change for change, _ in fits]).view_as(parameter).to(parameter.dtype)
        if offset is not None:
            tensor, sign = offset
            tensor += sign * torch.cat([constant for _, constant in fits]).to(tensor.dtype)
        return None

    def _equations(
        self, now: Point, then: Point, model: nn.Module, trace: Trace, kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the reader sees, [n, C, taps], and what its output lacks there, [n, M], at places picked at random."""
        layer, here = now.layer, trace.live(model)
        summed = now.other is not None and then.other is not None
        ends = [layer.call, layer.x, *([now.other] if summed and now.other is not None else [])]
        goal = then.total if summed else then.layer.output
        picks = torch.Generator().manual_seed(0)
        seen, missing = [], []
        for inputs in self._parts(trace, ends):
            values = _values(trace, here, ends, inputs)
            (wanted,) = _values(self._unpruned, self._unpruned.live(self._original), [goal], inputs)
            z, x, *other = map(layer.channels_first, values)
            wanted = layer.channels_first(wanted)[:, kept.to(x.device)]
            if other:
                wanted = wanted - other[0]
            if layer.output is not layer.call:
                wanted = _before(batchnorm.affine(layer.output, here), wanted, z)
            places = torch.randperm(z[:, 0].numel(), generator=picks)[: self._count(layer.kernel(here), x, z)]
            dtype, places = torch.promote_types(x.dtype, torch.float32), places.to(x.device)
            seen.append(layer.patches(layer.padded_wholly(x), z.shape[2:], places).to(dtype))
            missing.append((wanted - z).movedim(1, -1).flatten(0, -2)[places].to(dtype))
        return torch.cat(seen), torch.cat(missing)

    def _count(self, kernel: Tensor, x: Tensor, z: Tensor) -> int:
        """How many places of a part of the images to look at."""
        unknowns, seen = kernel[0].numel(), x.shape[1] * kernel[0, 0].numel()
        whole = min(_EQUATIONS * unknowns, self._memory // (12 * seen))
        return max(1, -(-whole * len(z) // length(self._inputs)))

    def _parts(self, trace: Trace, ends: Sequence[fx.Node]) -> Iterator[Any]:
        """The samples, so many at a time that a few values of the network fit the memory."""
        before = [node for node in ancestors(ends) if node.op == "call_function"]
        largest = max(trace.nbytes([node], trace.example_batch) for node in before) // trace.example_batch
        room = self._memory // 8
        if tensors(self._inputs)[0].device.type == "cpu":
            room = min(room, CPU_VALUE * torch.get_num_threads())
        step = max(1, room // max(1, largest)) if trace.dynamic else trace.example_batch
        for start in range(0, length(self._inputs), step):
            yield pytree.tree_map(lambda t, start=start: t[start : start + step], self._inputs)


def least_squares(x: Tensor, y: Tensor, offset: bool) -> tuple[Tensor, Tensor]:
    """Ridge regression: the [M, F] and [M] that minimise |x change^T + constant - y|^2 + lambda |change|^2.

    Args:
        x: [n, F].
        y: [n, M].
        offset: whether there is a constant; zero otherwise.
    """
    means = [t.mean(0) if offset else torch.zeros_like(t[0]) for t in (x, y)]
    x, y = x - means[0], y - means[1]
    ridge = RIDGE * x.square().sum() / max(1, x.shape[1])
    if not ridge:  # nothing to learn from
        return x.new_zeros(y.shape[1], x.shape[1]), means[1]
    if x.shape[1] <= len(x):
        squares, products = (x.T @ x).double(), (x.T @ y).double()
        squares.diagonal().add_(ridge)
        change = torch.linalg.solve(squares, products).to(x.dtype)
    else:
        squares = (x @ x.T).double()
        squares.diagonal().add_(ridge)
        change = x.T @ torch.linalg.solve(squares, y.double()).to(x.dtype)
    return change.T, means[1] - means[0] @ change


def _offset(trace: Trace, point: Point, tensors: dict[str, Tensor]) -> tuple[Tensor, int] | None:
    """What shifts a layer's output, and with which sign: its bias, or the mean that its batch norm takes away."""
    call, norm = point.layer.call, point.layer.output
    if (bias := trace.parameter(call, 2, "bias")) is not None:
        return tensors[bias], 1
    mean = trace.parameter(norm, 3, "running_mean") if norm is not call else None
    return None if mean is None else (tensors[mean], -1)


def _before(norm: batchnorm.Affine, y: Tensor, z: Tensor) -> Tensor:
    """What a batch norm would have to be given to put out y; z where it puts out the same whatever it is given."""
    shape = (1, -1, *[1] * (y.dim() - 2))
    scale, shift = norm.scale.view(shape), norm.shift.view(shape)
    dead = scale.abs() <= 1e-6 * scale.abs().max()
    return torch.where(dead, z, (y - shift) / torch.where(dead, 1, scale))


def _values(graph: Trace, live: Env, ends: Sequence[fx.Node], inputs: Any) -> list[Tensor]:
    """What some nodes hold for some inputs."""
    env, needed = live | graph.feed(inputs), ancestors(ends)
    graph.run([node for node in graph.nodes if node in needed], env, length(inputs), keep=ends)
    return [env[node] for node in ends]
