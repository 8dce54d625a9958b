"""Copies of models that hold on to what their last forward pass computed."""

from __future__ import annotations

import copy
import dis
import logging
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from ..memory import raise_shortage

log = logging.getLogger("singe")


def copy_of(model: nn.Module, shared: Collection[Tensor] = ()) -> nn.Module:
    """A deep copy; tensors with a gradient history that modules keep as attributes are copied without it.

    Args:
        model: not modified.
        shared: parameters and buffers that the copy is to share with it.

    Raises:
        ValueError: a hook holds a module of it, see :func:`check_hooks`, or a module's own ``__deepcopy__`` shares
            parameters or buffers with it.
    """
    check_hooks(model)
    memo = {id(t): t.detach().clone() for t in _attributes(model) if not t.is_leaf}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_inference():  # it could not be trained, nor could autograd tell whether it has changed
            plain = tensor.clone()
            memo[id(tensor)] = nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
    memo |= {id(tensor): tensor for tensor in shared}
    copied: nn.Module = copy.deepcopy(model, memo)
    own = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for tensor in shared:
        own.pop(id(tensor), None)
    names = [own[id(t)] for t in (*copied.parameters(), *copied.buffers()) if id(t) in own]
    if names:
        raise ValueError(f"the copy shares {', '.join(names[:3])}{', ...' if names[3:] else ''} with it")
    forget_passes(copied)
    return copied


def check_hooks(model: nn.Module) -> None:
    """Raises ValueError if a forward hook holds a module of the model.

    Copies would write to that module, and read of it what the model itself has computed.
    """
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if (held := next((m for m in _shared(hook, False, set()) if m in names), None)) is not None:
                raise ValueError(
                    f"expected a model whose copies work on themselves, but a forward hook of {name or 'the model'} "
                    f"holds {names[held] or 'the model itself'}, which copies would write to and read; make it a bound "
                    "method, as in register_forward_hook(self.keep), or use the module that a hook is given"
                )


def _shared(value: Any, within: bool, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a function holds, which ``copy.deepcopy`` leaves as it is; methods and partials it copies.

    Args:
        value: a function, method or partial, or what one of them holds.
        within: whether a function holds it.
        seen: ids of the functions that were looked into.
    """
    if isinstance(value, nn.Module) and within:
        yield value
    elif isinstance(value, partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _shared(part, within, seen)
    elif isinstance(value, MethodType):
        yield from _shared(value.__self__, within, seen)
        yield from _shared(value.__func__, within, seen)
    elif isinstance(value, FunctionType) and id(value) not in seen:
        seen.add(id(value))
        for held in _held(value):
            yield from _shared(held, True, seen)


def _held(function: FunctionType) -> Iterator[Any]:
    """What a function has captured, its defaults, and the globals that it reads."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # assigned later
            continue
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    read = {step.argval for step in dis.get_instructions(function) if step.opname == "LOAD_GLOBAL"}
    yield from (function.__globals__[name] for name in sorted(read) if name in function.__globals__)


def forget_passes(model: nn.Module) -> None:
    """Has modules drop what they keep of their weights from one pass in eval mode to the next.

    As some attention does with its position biases; its own ``train`` drops them. Only where a module has one of its
    own, the model is put into train mode and back; if it cannot be, it keeps nothing that this would drop.
    """
    if all(type(module).train is nn.Module.train for module in model.modules()):
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        model.train(modes[0][1])
        for module, training in modes:  # those around others first
            if module.training != training:
                module.train(training)
    except Exception as error:  # whatever the user's train raises
        raise_shortage(error)
        log.debug("%s is not put into train mode: %s", type(model).__name__, error)
    finally:
        for module, training in modes:
            module.training = training


def _attributes(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that modules hold as attributes, alone or in lists, tuples, sets and mappings."""
    seen: set[int] = set()
    todo: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (Mapping, list, tuple, set, deque)) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, Mapping) else value
