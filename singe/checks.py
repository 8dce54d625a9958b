"""Models and batches are checked before work starts: every check says what was expected and what was given."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .graph.groups import qualified
from .graph.trace import Trace
from .memory import raise_shortage
from .models.batches import Batch, described, with_dicts
from .models.copies import check_hooks, copy_of
from .models.isolation import plain_torch
from .models.numerics import alike
from .models.widths import widths_by_tensors
from .ops import FLOATING
from .task import Task

log = logging.getLogger("singe")


def sound_model(model: nn.Module) -> torch.device:
    """The device of a sound model: all of it on one device that computes in its dtypes, with finite weights.

    Raises:
        ValueError: the model is not sound; says why.
    """
    real_weights(model)
    device = device_of(model)
    computable(model)
    finite_weights(model)
    true_attributes(model)
    return device


_QUANTISED = tuple(f"torch.ao.{place}" for place in (
    "nn.quantized", "nn.intrinsic.quantized", "nn.qat", "nn.intrinsic.qat", "quantization.observer",
    "quantization.fake_quantize",
))  # fmt: skip
"""Where torch keeps modules whose weights or activations are quantised, or about to be."""


def real_weights(model: nn.Module) -> None:
    """Raises ValueError, naming what it is, if a model's tensors are quantised, not strided, or not there yet."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            raise ValueError(
                f"expected a model that is not quantised, got {name or 'one'} of {type(module).__name__}; prune first, "
                "and quantise the result"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"expected initialised weights, got {name} without values; run the model on a batch first")
        if isinstance(tensor, nn.Parameter) and type(tensor.detach()) is not Tensor:
            raise ValueError(
                f"expected plain tensors, got {name} of {type(tensor.detach()).__name__}; a sharded model is gathered "
                "first, a quantised one is made from the pruned one"
            )
        if tensor.is_meta:
            raise ValueError(f"expected a model on a device, got {name} on 'meta', which holds no values")
        if tensor.is_quantized:
            raise ValueError(f"expected tensors that are not quantised, got {name} of {tensor.dtype}")
        if tensor.layout is not torch.strided:
            raise ValueError(
                f"expected strided tensors, got {name} of layout {tensor.layout}; register its to_dense(), "
                "or keep it out of the model if its forward does without"
            )


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's parameters.

    Raises:
        ValueError: no parameters, or parameters on several devices.
    """
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"expected a model whose parameters are on one device, got {found}")
    return devices.pop()


def finite_weights(model: nn.Module) -> None:
    """Raises ValueError, naming the tensor, if a parameter holds NaN or infinity, or a buffer NaN."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter.detach()):
            raise ValueError(f"expected finite weights, got NaN or infinity in {name}")
    for name, tensor in model.named_buffers():
        if tensor.isnan().any():  # infinity is what masks are made of
            raise ValueError(f"expected buffers without NaN, got NaN in {name}")


def true_attributes(model: nn.Module) -> None:
    """Raises ValueError if a module's attributes contradict the widths of its tensors; names them."""
    for name, module in model.named_modules():
        for attribute, value in widths_by_tensors(module).items():
            if (found := getattr(module, attribute)) != value:
                raise ValueError(
                    f"expected {qualified(name, attribute)} to be {value}, as its tensors are, got {found}"
                )


def computable(model: nn.Module) -> None:
    """Raises ValueError unless the model's device computes in the dtypes of its parameters, gradients included."""
    for (dtype, device), name in {(p.dtype, p.device): name for name, p in model.named_parameters()}.items():
        if dtype not in FLOATING:
            raise ValueError(f"expected weights of float64, float32, float16 or bfloat16, got {name} of {dtype}")
        try:
            with plain_torch(device), torch.enable_grad():
                x = torch.ones(2, 1, 3, 3, dtype=dtype, device=device)
                weight = torch.ones(1, 1, 3, 3, dtype=dtype, device=device, requires_grad=True)
                F.conv2d(x, weight).sum().backward(inputs=[weight])
        except RuntimeError as error:
            raise ValueError(f"expected weights of a dtype that {device} computes in, got {dtype}: {error}") from error


def batch_of(item: Any, device: torch.device, task: Task) -> Batch:
    """A batch on ``device``.

    Raises:
        TypeError: not a pair (x, y) of tensors, or not nested tensors where the task has a ``forward`` of its own.
        ValueError: empty, with tensors of different lengths, or x holds NaN or infinity.
    """
    if task.forward is None:
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise TypeError(f"expected a batch (x, y), got {_describe(item)}; other batches need forward= and loss=")
        if not all(isinstance(v, Tensor) for v in item):
            raise TypeError(f"expected a batch (x, y) of tensors, got {_describe(item)}")
    item = with_dicts(item)
    found = pytree.tree_flatten_with_path(item)[0]
    for path, leaf in found:
        if not isinstance(leaf, Tensor):
            where = f" at {pytree.keystr(path)}" if path else ""
            raise TypeError(
                f"expected a batch of tensors in lists, tuples and dicts, got {type(leaf).__name__}{where}, which the "
                "loader should leave out"
            )
    leaves = [leaf for _, leaf in found]
    if not leaves:
        raise TypeError(f"expected a batch of tensors, got {_describe(item)} without any")
    for path, leaf in found:
        if leaf.dim() == 0 or len(leaf) == 0 or len(leaf) != len(leaves[0]):
            where = f" with {tuple(leaf.shape)} at {pytree.keystr(path)}" if path else ""
            raise ValueError(
                f"expected a batch of tensors of one length, at least 1, got {described(item)}{where}; what has "
                "another length, such as a list for each sample, is to be padded or left out by the loader"
            )
    if task.forward is None:
        finite_inputs(leaves[0])
    # a copy to the CPU that does not wait may be read before it is there
    moved: Batch = pytree.tree_map(lambda t: _plain(t).to(device, non_blocking=device.type != "cpu"), item)
    return moved


def example(value: Any, device: torch.device, task: Task) -> Batch:
    """A batch on ``device`` from an example x of ``model(x)``, or of whatever the task's ``forward`` takes.

    Raises:
        TypeError, ValueError: as :func:`batch_of` does.
    """
    if task.forward is not None:
        return batch_of(value, device, task)
    if not isinstance(value, Tensor):
        remark = "of a batch (x, y) pass x alone" if isinstance(value, (tuple, list)) else "other models need forward="
        raise TypeError(f"expected example to be a tensor x, got {type(value).__name__}; {remark}")
    x, _ = batch_of((value, value.new_zeros(value.shape[:1])), device, task)
    return x, x  # a task's batch is a pair; nobody looks at y here


def something_to_prune(kind: str, able: Collection[Any], frozen: Mapping[str, str]) -> None:
    """Logs what stays whole.

    Args:
        kind: of what there is to prune, "neurons" or "weights".
        able: the parts that may lose some.
        frozen: names of the others -> why.

    Raises:
        ValueError: no part may lose any.
    """
    for name, reason in frozen.items():
        log.info("%s is not pruned: %s", name, reason)
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in frozen.items())
        raise ValueError(f"expected a model with {kind} to prune, found none ({reasons or 'no layers'})")


def finite_inputs(inputs: Batch) -> None:
    """Raises ValueError if a tensor of ``inputs`` holds NaN or infinity."""
    if not all(map(_finite, pytree.tree_leaves(inputs))):
        raise ValueError("expected finite inputs, got NaN or infinity in x")


def _finite(t: Tensor) -> bool:
    """Whether no value is NaN or infinite, told by the bounds where there are any: it is asked of every batch."""
    if t.dtype in FLOATING and t.numel():
        t = torch.stack(t.aminmax())  # NaN if any value is
    return bool(t.isfinite().all())


def _plain(t: Tensor) -> Tensor:
    """The tensor without gradient history, usable by autograd."""
    if t.is_inference():
        return t.clone()
    return t.detach() if t.requires_grad else t


def working_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, to work on.

    Raises:
        ValueError: the model cannot be copied.
    """
    check_hooks(model)
    try:
        return copy_of(model).eval()
    except Exception as error:
        raise_shortage(error)
        raise ValueError(
            f"expected a model that copy.deepcopy can copy, but {type(model).__name__} holds what it cannot (such as a "
            "lock, torch.nn.utils.prune masks, tensors with a gradient history inside other objects, or a module with "
            f"a __deepcopy__ that shares): {error}"
        ) from error


def runs(model: nn.Module, batch: Batch, task: Task) -> None:
    """Raises ValueError if the model fails on a batch or does not answer the same twice."""
    if not alike(*(answers(model, batch, task) for _ in range(2))):
        raise ValueError(f"expected {type(model).__name__} to answer alike in eval mode, got two different answers")


def answers(model: nn.Module, batch: Batch, task: Task) -> Any:
    """What the model answers to a batch.

    Raises:
        ValueError: it fails on it.
    """
    try:
        with torch.no_grad():
            return task.outputs(model, batch)
    except Exception as error:
        raise_shortage(error)
        call = "model(x)" if task.forward is None else "forward(model, batch)"
        raise ValueError(
            f"expected batches that fit {type(model).__name__}, but {call} failed for inputs of "
            f"{described(task.inputs(batch))}: {error}"
        ) from error


def own_weights(model: nn.Module, graph: Trace) -> None:
    """Raises ValueError if the traced copy of ``model`` works on the weights of the model itself."""
    names = {p.data_ptr(): name for name, p in model.named_parameters() if p.numel()}
    held = [names[t.data_ptr()] for t in graph.constants.values() if t.data_ptr() in names]
    if held:
        raise ValueError(
            f"expected a model whose copies work on weights of their own, but a copy of {type(model).__name__} uses "
            f"{held[0]} of the model given, which something in it holds on to (such as self.f = "
            "torch.compile(self.method), a lambda or a partial)"
        )


def _describe(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} of ({', '.join(type(v).__name__ for v in item)})"
    return type(item).__name__
