"""The outputs that a layer should have on some samples for the network to continue as another one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from ..graph import batchnorm
from ..graph.layer import is_affine
from ..graph.point import Point, find_point
from ..graph.trace import Trace, named_tensors
from ..memory import CPU_VALUE
from ..models.batches import Batch, length, tensors
from ..removal.plan import Plan
from ..task import Task
from .activations import Activations

_EQUATIONS = 64
"""Equations for each unknown of an output channel, if there are enough; four times as many help little, cost more."""

_FEWEST = 4
"""Likewise, the least for a layer to be refitted when that is optional, or for statistics."""

_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Equations:
    """A reader's inputs, and what its outputs lack, at places picked at random.

    Attributes:
        parts: the number of groups of a convolution.
        x: [n, C, taps], its inputs there.
        missing: [n, M], what its output, before any batch norm, lacks there.
        offset: the name of the bias, or of the mean that its batch norm subtracts, and the sign with which it shifts
            the output; None where there is neither that nothing else uses.
        norm: the batch norm after it, if it has one to itself.
        output: [n, M], the inputs of that batch norm there; None without one.
    """

    parts: int
    x: Tensor
    missing: Tensor
    offset: tuple[str, int] | None
    norm: batchnorm.Norm | None
    output: Tensor | None

    @property
    def unknowns(self) -> int:
        """The weights of an output channel."""
        return self.x.shape[1] * self.x.shape[2] // self.parts

    @property
    def plenty(self) -> bool:
        """Whether there are many more than unknowns: otherwise a solution fits these samples only."""
        return len(self.x) >= _FEWEST * self.unknowns

    def enough(self) -> Equations | str:
        """The equations themselves, or a reason that there are too few."""
        few = f"{len(self.x):,} equations are too few for {self.unknowns:,} unknowns"
        return self if self.plenty else f"{few}: under {_FEWEST} for each"

    def without(self, weight: Tensor, columns: Tensor) -> Equations:
        """The equations of the reader without some of its inputs.

        Args:
            weight: the reader's, [M, C / parts, ...], with which it would have read them.
            columns: int64, along the weight's axis 1.
        """
        x = self.x.unflatten(1, (self.parts, -1)).clone()  # [n, parts, C / parts, taps]
        own = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
        own = own[:, columns].unflatten(0, (self.parts, -1)).to(x.dtype)  # [parts, M / parts, columns, taps]
        lost = torch.einsum("npkt,pmkt->npm", x[:, :, columns], own).flatten(1)
        x[:, :, columns] = 0
        output = None if self.output is None else self.output - lost
        return replace(self, x=x.flatten(1, 2), missing=self.missing + lost, output=output)


class Wanted:
    """The values that the layers of a pruned network are to have: those of another, such as the unpruned one.

    Args:
        model: that other network, in any mode.
        trace: of it in eval mode.
        batch: samples to compare on.
        task: how it is called.
        memory: bytes that activations and equations may take, roughly.
        plan: what has been removed from it, read whenever that is asked for; nothing by default.
    """

    def __init__(
        self, model: nn.Module, trace: Trace, batch: Batch, task: Task, memory: int, plan: Plan | None = None
    ) -> None:
        self._model, self._trace, self.memory = model, trace, memory
        self.plan = Plan() if plan is None else plan
        self._inputs = task.inputs(batch)
        self._step = self._fitting(trace)
        self._whole = self._pruned = Activations(trace, self._inputs, self._step, memory // 4)

    @torch.no_grad()
    def equations(self, model: nn.Module, trace: Trace, weight: str) -> Equations | str:
        """The equations of the layer of a weight, or why there are none.

        The wanted output is the one with which values downstream match those of the other network: after the batch
        norm and, in a residual block, in the sum with the shortcut, taking the shortcut as it is in ``model``.

        Args:
            model: pruned.
            trace: of its current state.
            weight: of a layer that is used once.
        """
        now, then = find_point(trace, weight), find_point(self._trace, weight)
        if isinstance(now, str) or isinstance(then, str):
            return now if isinstance(now, str) else str(then)
        known = named_tensors(model)
        kept = torch.ones(len(named_tensors(self._model)[weight]), dtype=torch.bool)
        kept[self.plan.removed().get((weight, 0), _NOTHING)] = False
        x, missing, output = self._seen(now, then, model, trace, kept)
        parts = x.shape[1] * x.shape[2] // known[weight][0].numel()
        norm = batchnorm.norm_at(trace, now.layer.output)
        return Equations(parts, x, missing, _offset(trace, now), norm, output if norm is not None else None)

    def _seen(
        self, now: Point, then: Point, model: nn.Module, trace: Trace, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reader's inputs, [n, C, taps], what it lacks and its outputs, [n, M], at places picked at random."""
        layer, here = now.layer, trace.live(model)
        summed = now.other is not None and then.other is not None
        ends = [layer.call, layer.x, *([now.other] if summed and now.other is not None else [])]
        goal = then.total if summed else then.layer.output
        picks = torch.Generator().manual_seed(0)
        seen, missing, outputs = list[Tensor](), list[Tensor](), list[Tensor]()
        self._look_into(trace)
        looks = self._pruned(model, ends, again=_in_front(layer.x)), self._whole(self._model, [goal])
        for values, (wanted,) in zip(*looks, strict=True):
            z, x, *other = map(layer.channels_first, values)
            wanted = layer.channels_first(wanted)[:, kept.to(x.device)]
            if other:
                wanted = wanted - other[0]
            if layer.output is not layer.call:
                wanted = _before(batchnorm.affine(layer.output, here), wanted, z)
            places = torch.randperm(z[:, 0].numel(), generator=picks)[: self._count(layer.kernel(here), x, z)]
            dtype, places = torch.promote_types(x.dtype, torch.float32), places.to(x.device)
            seen.append(layer.patches(layer.padded_wholly(x), z.shape[2:], places).to(dtype))
            for found, value in ((missing, wanted - z), (outputs, z)):
                found.append(value.movedim(1, -1).flatten(0, -2)[places].to(dtype))
        return torch.cat(seen), torch.cat(missing), torch.cat(outputs)

    def _count(self, kernel: Tensor, x: Tensor, z: Tensor) -> int:
        """How many places of a part of the images to use."""
        unknowns, values = kernel[0].numel(), x.shape[1] * kernel[0, 0].numel() + len(kernel)
        whole = min(_EQUATIONS * unknowns, self.memory // (12 * values))
        return max(1, -(-whole * len(z) // length(self._inputs)))

    def _look_into(self, trace: Trace) -> None:
        """Creates the values of a pruned network's graph, unless it is the same as last time."""
        if self._pruned is not self._whole and self._pruned.graph is trace:
            return
        room, step = self.memory // 4, self._step if trace.dynamic else trace.example_batch
        self._pruned = Activations(trace, self._inputs, step, room)
        if step != self._whole.step:
            self._whole = Activations(self._trace, self._inputs, step, room)

    def _fitting(self, graph: Trace) -> int:
        """How many samples to pass at a time, so that a few values of the network fit into memory."""
        if not graph.dynamic:
            return graph.example_batch
        room, largest = self.memory // 8, max(graph.nbytes([node], graph.example_batch) for node in graph.nodes)
        if tensors(self._inputs)[0].device.type == "cpu":
            room = min(room, CPU_VALUE * torch.get_num_threads())
        return max(1, room * graph.example_batch // max(1, largest))


def _in_front(node: fx.Node) -> set[fx.Node]:
    """The inputs of the layers before a value: those are pruned next, and the value is then needed again."""
    found, stack, seen = set(), [node], set()
    while stack:
        at = stack.pop()
        if at in seen or at.op != "call_function":
            continue
        seen.add(at)
        if is_affine(at):
            found.add(at.all_input_nodes[0])
        else:
            stack.extend(at.all_input_nodes)
    return found


def _offset(trace: Trace, point: Point) -> tuple[str, int] | None:
    """What shifts a layer and no other, and with which sign: its bias, or the mean that its batch norm subtracts."""
    call, norm = point.layer.call, point.layer.output
    if (bias := trace.parameter(call, 2, "bias")) is not None and len(trace.calls(bias)) == 1:
        return bias, 1
    mean = trace.parameter(norm, 3, "running_mean") if norm is not call else None
    return None if mean is None or len(trace.calls(mean)) != 1 else (mean, -1)


def _before(norm: batchnorm.Affine, y: Tensor, z: Tensor) -> Tensor:
    """The input with which a batch norm outputs y; z where its output does not depend on its input."""
    shape = (1, -1, *[1] * (y.dim() - 2))
    scale, shift = norm.scale.view(shape), norm.shift.view(shape)
    dead = scale.abs() <= 1e-6 * scale.abs().max()
    return torch.where(dead, z, (y - shift) / torch.where(dead, 1, scale))
