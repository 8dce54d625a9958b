"""The outputs that a layer should have on some samples for the network to continue as another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..graph import batchnorm
from ..graph.groups import Slice
from ..graph.layer import is_layer, turned
from ..graph.nodes import selectors
from ..graph.point import Point, find_points
from ..graph.trace import Env, Trace, named_tensors
from ..memory import CPU_VALUE
from ..models.batches import Batch, length, tensors
from ..removal.plan import Plan
from ..task import Task
from .activations import Activations
from .regression import Regressions, Samples, regression

_EQUATIONS = 64
"""Equations for each unknown of an output channel, if there are enough; four times as many help little, cost more."""

_FEWEST = 4
"""Likewise, the least for a layer to be refitted when that is optional, or for statistics."""


@dataclass(frozen=True, eq=False)
class Equations:
    """A reader's inputs, and what its outputs lack, at places picked at random, wherever it is used.

    Its kernel is its weight as an ordinary convolution has it: [M, C / groups, taps].

    Attributes:
        groups: the number of groups of a convolution.
        transposed: whether it is a transposed convolution.
        x: [n, C, taps], its inputs there.
        missing: [n, M], what its output, before any batch norm, lacks there.
        offset: the name of the bias, or of the mean that its batch norm subtracts, and the sign with which it shifts
            the output; None where there is neither that nothing else uses.
        norm: the batch norm after it, if it has one to itself.
        output: [n, M], what the output is there, before any batch norm.
    """

    groups: int
    transposed: bool
    x: Tensor
    missing: Tensor
    offset: tuple[str, int] | None
    norm: batchnorm.Norm | None
    output: Tensor

    @property
    def unknowns(self) -> int:
        """The weights of an output channel."""
        return self.x.shape[1] * self.x.shape[2] // self.groups

    @property
    def plenty(self) -> bool:
        """Whether there are many more than unknowns: otherwise a solution fits these samples only."""
        return len(self.x) >= _FEWEST * self.unknowns

    @property
    def restated(self) -> batchnorm.Norm | None:
        """The batch norm after it, if there are equations enough to tell new statistics."""
        return self.norm if self.plenty else None

    def enough(self) -> Equations | str:
        """The equations themselves, or a reason that there are too few."""
        few = f"{len(self.x):,} equations are too few for {self.unknowns:,} unknowns"
        return self if self.plenty else f"{few}: under {_FEWEST} for each"

    def as_kernel(self, weight: Tensor) -> Tensor:
        """The reader's weight as a kernel."""
        kernel = turned(weight, self.groups) if self.transposed else weight
        return kernel.reshape(*kernel.shape[:2], -1)

    def as_weight(self, rows: Tensor) -> Tensor:
        """[M, C / groups * taps], the rows of a kernel, as the weight, with its taps along one axis."""
        kernel = rows.unflatten(1, (-1, self.x.shape[2]))
        return turned(kernel, self.groups) if self.transposed else kernel

    def neurons(self, read: Slice) -> Tensor:
        """int64 [C / groups]: the neuron that each column of the kernel reads, -1 for none.

        Args:
            read: of the weight; all groups read the same.
        """
        return read.neuron.view(self.groups, -1)[0] if self.transposed else read.neuron

    def regressions(self, inputs: bool) -> Regressions:
        """What the reader's weights and offset are to make up for.

        Args:
            inputs: whether weights may change; the offset alone otherwise.
        """
        outputs = self.output if self.restated is not None else self.output[:, :0]
        split = (t.tensor_split(self.groups, 1) for t in (self.x, self.missing, outputs))
        parts = [(x.flatten(1), missing, output) for x, missing, output in zip(*split, strict=True)]
        return Regressions([regression(*part) if inputs else Samples(*part[:2]) for part in parts])


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
            weight: of a layer.
        """
        now, then = find_points(trace, weight), find_points(self._trace, weight)
        if isinstance(now, str) or isinstance(then, str):
            return now if isinstance(now, str) else str(then)
        layer, whole = now[0].layer, named_tensors(self._model)[weight]
        kept = then[0].layer.rows_left(whole, self.plan.removed())
        uses = [_Use(here, there, kept) for here, there in zip(now, then, strict=True)]
        seen = self._seen(uses, model, trace)
        if isinstance(seen, str):
            return seen
        x, missing, output = seen
        groups = x.shape[1] // layer.kernel(trace.live(model)).shape[1]
        return Equations(
            groups=groups, transposed=layer.transposed, x=x, missing=missing, offset=_offset(trace, now),
            norm=batchnorm.norm_at(trace, [point.layer.output for point in now]), output=output,
        )  # fmt: skip

    def _seen(self, uses: Sequence[_Use], model: nn.Module, trace: Trace) -> tuple[Tensor, Tensor, Tensor] | str:
        """The reader's inputs, [n, C, taps], what it lacks and its outputs, [n, M], at places picked at random.

        Or why there are none.
        """
        live, picks = trace.live(model), torch.Generator().manual_seed(0)
        kernel, drawn = uses[0].layer.kernel(live), list[tuple[Tensor, Tensor, Tensor]]()
        self._look_into(trace)
        again = set[fx.Node]().union(*(_in_front(use.layer.x) for use in uses))
        pruned = self._pruned(model, [end for use in uses for end in use.ends], again)
        whole = self._whole(self._model, [goal for use in uses for goal in use.goals])
        for ends, goals in zip(pruned, whole, strict=True):
            here, there = iter(ends), iter(goals)
            pairs = [([next(here) for _ in use.ends], [next(there) for _ in use.goals]) for use in uses]
            if not all(use.same_samples(*pair) for use, pair in zip(uses, pairs, strict=True)):
                return "other samples reach it than in the network that it is to be like"
            found = [use.values(*pair, live) for use, pair in zip(uses, pairs, strict=True)]
            places = [z[:, 0].numel() for _, _, z in found]
            count = self._count(kernel, max((x for x, _, _ in found), key=len))
            for use, values, own in zip(uses, found, places, strict=True):
                if own:
                    some = torch.randperm(own, generator=picks)[: -(-count * own // sum(places))]
                    drawn.append(use.at(some, *values))
        if not drawn:
            return "no samples reach it"
        x, missing, output = map(torch.cat, zip(*drawn, strict=True))
        return x, missing, output

    def _count(self, kernel: Tensor, x: Tensor) -> int:
        """How many places to use of a part of the images, x [B, C, ...]."""
        unknowns, values = kernel[0].numel(), x.shape[1] * kernel[0, 0].numel() + len(kernel)
        whole = min(_EQUATIONS * unknowns, self.memory // (12 * values))
        return max(1, -(-whole * len(x) // length(self._inputs)))

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
        room = self.memory // 8
        if tensors(self._inputs)[0].device.type == "cpu":
            room = min(room, CPU_VALUE * torch.get_num_threads())
        return graph.samples_within(room, graph.largest())


class _Use:
    """One of the places where a reader is used.

    Args:
        now: in the pruned network.
        then: in the other.
        kept: bool [N], the channels of its output in the other that are left in the pruned one.

    Attributes:
        layer: in the pruned network.
        ends: the values of the pruned network that matter here.
        goals: those of the other one.
    """

    def __init__(self, now: Point, then: Point, kept: Tensor) -> None:
        self.layer, self._kept = now.layer, kept
        summed = now.other is not None and then.other is not None
        picks = selectors(now.layer.call)
        self._picks = len(picks)
        self.ends = [*picks, now.layer.call, now.layer.x]
        self.ends += [now.other] if summed and now.other is not None else []
        self.goals = [*selectors(then.layer.call), then.total if summed else then.layer.output]

    def same_samples(self, ends: Sequence[Tensor], goals: Sequence[Tensor]) -> bool:
        """Whether the layer sees the same samples in both, of some images; arguments as of :meth:`values`."""
        here, there = ends[: self._picks], goals[:-1]
        return len(here) == len(there) and all(map(torch.equal, here, there))

    def values(self, ends: Sequence[Tensor], goals: Sequence[Tensor], live: Env) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's inputs, what its outputs lack and its outputs, channels first.

        Args:
            ends: for some images.
            goals: likewise.
            live: the values of the pruned network's parameters.
        """
        z, x, *other = map(self.layer.channels_first, ends[self._picks :])
        wanted = self.layer.channels_first(goals[-1])[:, self._kept.to(x.device)]
        if other:
            wanted = wanted - other[0]
        if self.layer.output is not self.layer.call:
            wanted = _before(batchnorm.affine(self.layer.output, live), wanted, z)
        return x, wanted - z, z

    def at(self, places: Tensor, x: Tensor, missing: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same at some places of the outputs, [n, C, taps], [n, N] and [n, N], in float32 at least."""
        dtype, places = torch.promote_types(x.dtype, torch.float32), places.to(x.device)
        seen = self.layer.patches(x, output.shape[2:], places)
        missing, output = (value.movedim(1, -1).flatten(0, -2)[places].to(dtype) for value in (missing, output))
        return seen.to(dtype), missing, output


def _in_front(node: fx.Node) -> set[fx.Node]:
    """The inputs of the layers before a value: those are pruned next, and the value is then needed again."""
    found, stack, seen = set(), [node], set()
    while stack:
        at = stack.pop()
        if at in seen or at.op != "call_function":
            continue
        seen.add(at)
        if is_layer(at):
            found.add(at.all_input_nodes[0])
        else:
            stack.extend(at.all_input_nodes)
    return found


def _offset(trace: Trace, points: Sequence[Point]) -> tuple[str, int] | None:
    """What shifts a layer and no other, and with which sign: its bias, or the mean that its batch norm subtracts."""
    calls, norms = [point.layer.call for point in points], [point.layer.output for point in points]
    bias = trace.parameter(calls[0], 2, "bias")
    if bias is not None and trace.calls(bias) == calls:
        return bias, 1
    mean = trace.parameter(norms[0], 3, "running_mean") if norms != calls else None
    return None if mean is None or trace.calls(mean) != norms else (mean, -1)


def _before(norm: batchnorm.Affine, y: Tensor, z: Tensor) -> Tensor:
    """The input with which a batch norm outputs y; z where its output does not depend on its input."""
    shape = (1, -1, *[1] * (y.dim() - 2))
    scale, shift = norm.scale.view(shape), norm.shift.view(shape)
    dead = scale.abs() <= 1e-6 * scale.abs().max()
    return torch.where(dead, z, (y - shift) / torch.where(dead, 1, scale))
