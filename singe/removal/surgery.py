"""Masks become smaller tensors: zeroing and cutting a model's parameters in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Adafactor, Optimizer

from ..graph.groups import Slice, module_of, own_name, qualified
from ..graph.trace import named_tensors
from ..models.copies import forget_passes
from ..models.widths import integers, set_integer, widths_by_tensors

Removed = Mapping[tuple[str, int], Tensor]
"""(parameter or buffer name, axis), or (name of an integer attribute, 0), -> int64 indices of that axis to remove."""


def mask(model: nn.Module, slices: Iterable[Slice], neurons: Tensor, optimizer: Optimizer | None = None) -> None:
    """Zeroes everything ``neurons`` (int64) own, including their readers' columns, and the optimiser's state for it."""
    zero(model, {(s.tensor, s.dim): s.indices(neurons) for s in slices if s.role != "width"}, optimizer)


@torch.no_grad()
def zero(model: nn.Module, removed: Removed, optimizer: Optimizer | None = None) -> None:
    """Zeroes the entries that :func:`compact` would cut out of tensors, and the optimiser's state for them."""
    for (name, dim), index in removed.items():
        tensor = getattr(model.get_submodule(module_of(name)), own_name(name))
        if not isinstance(tensor, Tensor):
            continue
        index = index.to(tensor.device)
        tensor.index_fill_(dim, index, 0)
        for state in matching_state(optimizer, tensor).values():
            if state.shape[dim] == tensor.shape[dim]:
                state.index_fill_(dim, index, 0)


@contextmanager
def held_at_zero(model: nn.Module, slices: Sequence[Slice], neurons: Tensor, optimizer: Optimizer) -> Iterator[None]:
    """Masks ``neurons`` again after every step of ``optimizer``, so that no gradient, momentum or decay moves them."""
    hook = optimizer.register_step_post_hook(lambda *_: mask(model, slices, neurons, optimizer))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def compact(model: nn.Module, removed: Removed, *optimizers: Optimizer | None) -> None:
    """Cuts indices out of a model's tensors in place and updates its modules' attributes.

    Keeps requires_grad, dtype, device, memory format, tied weights, hooks on modules and parameters, attributes and
    classes of parameters, train mode, and of each of the ``optimizers`` its parameter lists and per-element state
    (momentum and the like). Gradients are dropped, of weights that stay whole, too.

    Args:
        model: changed in place.
        removed: (tensor name, axis), or (attribute name, 0), -> int64 indices to remove.
        optimizers: hold some of the model's parameters.

    Raises:
        ValueError: an unknown name, an axis or index out of range, an axis that would become empty, or an optimiser
            whose state cannot be cut.
    """
    tensors, widths = named_tensors(model), named_integers(model)
    kept = {key: _kept(tensors, *key, indices) for key, indices in removed.items() if key[0] not in widths}
    left = {key[0]: len(_left(widths[key[0]], *key, indices)) for key, indices in removed.items() if key[0] in widths}
    blocks = {
        module: {attribute: _blocks_left(weight, len(tensors[weight]), getattr(module, attribute), kept[weight, 0])}
        for weight, module, attribute in _in_blocks(model)
        if (weight, 0) in kept
    }
    holding = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in holding if kept else ():
        _check_state(optimizer, tensors)
    axes_of: dict[int, dict[int, Tensor]] = defaultdict(dict)  # of a tensor, by whatever name
    for (name, dim), keep in kept.items():
        axes_of[id(tensors[name])][dim] = keep
    cut: dict[int, Tensor] = {}
    for name, old in tensors.items():
        if not (axes := axes_of.get(id(old))):
            continue
        if id(old) not in cut:
            cut[id(old)] = _cut(old, axes)
            for optimizer in holding:
                _follow(optimizer, old, cut[id(old)], axes)
        _replace(model.get_submodule(module_of(name)), own_name(name), cut[id(old)])
    for parameter in model.parameters() if cut else ():  # all: the next step would otherwise move some weights alone
        parameter.grad = None
    for module in model.modules():
        for name, value in blocks.get(module, {}).items():
            setattr(module, name, value)
        for name, value in widths_by_tensors(module).items():
            setattr(module, name, value)
    for name, value in left.items():
        set_integer(model.get_submodule(module_of(name)), own_name(name), value)
    forget_passes(model)


def named_integers(model: nn.Module) -> dict[str, int]:
    """Every integer attribute of every module, by qualified name: code may use these as the length of an axis."""
    modules = model.named_modules()
    return {qualified(at, name): value for at, module in modules for name, value in integers(module).items()}


def _kept(tensors: Mapping[str, Tensor], name: str, dim: int, indices: Tensor) -> Tensor:
    if name not in tensors:
        raise ValueError(f"expected the name of a parameter or buffer of the model, got {name!r}")
    shape = tensors[name].shape
    if not 0 <= dim < len(shape):
        raise ValueError(f"expected an axis of {name} (shape {tuple(shape)}), got {dim}")
    return _left(shape[dim], name, dim, indices)


def _left(size: int, name: str, dim: int, indices: Tensor) -> Tensor:
    """Those of ``size`` indices that are left without ``indices``."""
    if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise ValueError(f"expected indices of axis {dim} of {name} in [0, {size}), got {indices.tolist()}")
    keep = torch.ones(size, dtype=torch.bool)
    keep[indices.cpu()] = False
    if not keep.any():
        raise ValueError(f"expected at least one index of axis {dim} of {name} to stay, all {size} would go")
    return keep.nonzero().flatten()


def _cut(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    new = tensor.detach()
    for dim, keep in axes.items():
        new = new.index_select(dim, keep.to(tensor.device))
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == rank and tensor.is_contiguous(memory_format=memory_format):
            new = new.contiguous(memory_format=memory_format)
    if isinstance(tensor, nn.Parameter):  # of its own class, whatever arguments its constructor takes
        new = nn.Parameter.__new__(type(tensor), new, tensor.requires_grad)
    _inherit(new, tensor)
    return new


def _inherit(new: Tensor, old: Tensor) -> None:
    """Gives a tensor the attributes and hooks of the one it replaces; handles can still remove the hooks."""
    vars(new).update({name: value for name, value in vars(old).items() if name not in vars(new)})
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks) is not None:
            setattr(new, hooks, getattr(old, hooks))


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor


def _in_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules that divide their channels into blocks: weight, module, the attribute that says how many."""
    for name, module in model.named_modules():
        attribute = "groups" if isinstance(module, _ConvNd) else "num_groups"
        if isinstance(module, _ConvNd | nn.GroupNorm) and getattr(module, attribute) > 1:
            yield qualified(name, "weight"), module, attribute


def _blocks_left(weight: str, size: int, blocks: int, kept: Tensor) -> int:
    """How many blocks are left along axis 0: depthwise convolutions and group norms lose whole ones, others none."""
    sizes = torch.bincount(kept // (size // blocks))
    sizes = sizes[sizes > 0]
    if len(sizes.unique()) > 1:
        raise ValueError(
            f"expected as many rows of each of the {blocks} groups of {weight} to stay, got {sizes.tolist()}"
        )
    return len(sizes)


def matching_state(optimizer: Optimizer | None, parameter: Tensor) -> dict[str, Tensor]:
    """The optimiser's per-element state of a parameter: the tensors of its shape, or that are averages over an axis."""
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    return {k: v for k, v in state.items() if isinstance(v, Tensor) and _fits(v, parameter)}


def _fits(state: Tensor, parameter: Tensor) -> bool:
    return state.dim() == parameter.dim() and all(
        n in (1, size) for n, size in zip(state.shape, parameter.shape, strict=True)
    )


def _check_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Refuses an optimiser that keeps something else; of all parameters, as LBFGS keeps all of it with the first.

    Averages over an axis may stay only with torch's Adafactor: others decide by a parameter's shape which to keep.
    """
    for name, parameter in tensors.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.numel() <= 1 or value.shape == parameter.shape:
                continue
            if not (isinstance(optimizer, Adafactor) and _fits(value, parameter)):
                raise ValueError(
                    f"expected an optimizer whose state is one value per element, got {key} of shape "
                    f"{tuple(value.shape)} for {name} of shape {tuple(parameter.shape)}; make a new "
                    f"{type(optimizer).__name__}"
                )


def _follow(optimizer: Optimizer, old: Tensor, new: Tensor, axes: Mapping[int, Tensor]) -> None:
    """Puts ``new`` where the optimiser held ``old``, with its state cut in the same way."""
    for group in optimizer.param_groups:
        group["params"][:] = [new if p is old else p for p in group["params"]]  # some optimisers share the list
    matching = matching_state(optimizer, old)
    if old in optimizer.state:
        state = optimizer.state.pop(old)
        optimizer.state[new] = {**state, **{k: _cut_along(v, old, axes) for k, v in matching.items()}}


def _cut_along(state: Tensor, parameter: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """Cuts the axes that a state shares with its parameter."""
    return _cut(state, {dim: keep for dim, keep in axes.items() if state.shape[dim] == parameter.shape[dim]})
