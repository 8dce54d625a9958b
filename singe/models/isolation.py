"""What a run sets for itself and restores for the caller's process: random state, inference mode, autocast."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import nn

from .precision import callers_multiplication, exact_multiplication


@contextmanager
def preserved_random_state(loader: Any = None) -> Iterator[None]:
    """Restores the state of torch's, numpy's and Python's generators, and of the loader's own, even on errors."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    own = [(g, g.get_state()) for g in _generators(loader)]
    epochs = [(sampler, sampler.epoch) for sampler in counting_epochs(loader)]
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        for generator, state in own:
            generator.set_state(state)
        for sampler, epoch in epochs:
            sampler.set_epoch(epoch)


@contextmanager
def all_trained(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Has all parameters require gradients; gives these parameters, and afterwards they have no gradient."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    fixed = [p for p in parameters if not p.requires_grad]
    try:
        for p in fixed:
            p.requires_grad_(True)
        yield parameters
    finally:
        for p in fixed:
            p.requires_grad_(False)
        for p in parameters:
            p.grad = None


@contextmanager
def none_trained(model: nn.Module) -> Iterator[None]:
    """Has no parameter require gradients."""
    trained = [p for p in model.parameters() if p.requires_grad and not p.is_inference()]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


_CALLERS_DEVICE: ContextVar[torch.device | None] = ContextVar("callers_device", default=None)
"""The default device that the caller's own code expects; None where it is the CPU anyway."""


@contextmanager
def plain_torch(device: torch.device) -> Iterator[None]:
    """Inside, no inference mode, no autocast, no TF32 and no default device but the CPU, whatever the caller has set.

    Compiled parts of a model run uncompiled: copies with ever new shapes would be compiled again and again.
    """
    default = torch.get_default_device()
    foreign = default.type != "cpu"
    token = _CALLERS_DEVICE.set(default if foreign else None)
    try:
        with (
            torch.inference_mode(False),
            # without its cache, which the regions of a model would fill once for the whole run
            torch.autocast(device.type, enabled=False, cache_enabled=False),
            torch.compiler.set_stance("force_eager"),
            exact_multiplication(device),
            torch.device("cpu") if foreign else nullcontext(),
        ):
            yield
    finally:
        _CALLERS_DEVICE.reset(token)


@contextmanager
def callers_device() -> Iterator[None]:
    """Gives the caller's code (model, loss, loader) the default device it expects, inside :func:`plain_torch`."""
    device = _CALLERS_DEVICE.get()
    with device if device is not None else nullcontext():
        yield


@contextmanager
def callers_settings() -> Iterator[None]:
    """What :func:`callers_device` gives and the arithmetic that the caller has set, for what is measured or trained."""
    with callers_device(), callers_multiplication():
        yield


def same_modes(model: nn.Module, like: nn.Module) -> None:
    """Puts every module of a model into train or eval mode as its namesake in another, where it has one."""
    modes = {name: module.training for name, module in like.named_modules()}
    for name, module in model.named_modules():
        module.training = modes.get(name, module.training)


@contextmanager
def evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode inside, and every module's own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def seed_everything(seed: int, loader: Any = None) -> None:
    """Seeds the generators that :func:`preserved_random_state` restores."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # else the seed would be queued until CUDA starts
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in _generators(loader):
        generator.manual_seed(seed)


def counting_epochs(loader: Any) -> list[Any]:
    """The parts of a DataLoader that shuffle by an epoch number that they are given, such as a sampler."""
    return [
        part
        for part in _parts(loader)
        if callable(getattr(part, "set_epoch", None)) and isinstance(getattr(part, "epoch", None), int)
    ]


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader, its samplers and its dataset draw from."""
    return [part for part in _parts(loader) if isinstance(part, torch.Generator)]


def _parts(loader: Any) -> list[Any]:
    """A DataLoader, its samplers, its dataset, and the generators that they draw from."""
    found: dict[int, Any] = {}
    todo = [loader]
    while todo:
        part = todo.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            names = ("generator", "sampler", "batch_sampler", "dataset")
            todo += [] if isinstance(part, torch.Generator) else [getattr(part, name, None) for name in names]
            several = getattr(part, "datasets", None)  # of a ConcatDataset and the like
            several = tuple(several.values()) if isinstance(several, dict) else several
            todo += several if isinstance(several, (list, tuple)) else ()
    return list(found.values())
