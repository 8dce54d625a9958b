"""The model that a command line names: made by the user's factory, filled from a file, never unpickled."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..models.wrappers import PREFIXES
from .references import called, find

SHOWN = 3
"""The most names of tensors that a message lists."""

_NESTED = ("state_dict", "model_state_dict", "model", "ema", "state_dict_ema", "model_ema")


def make(reference: str) -> nn.Module:
    """The model of a factory, ``package.module:factory``, or a module of that name.

    Raises:
        ValueError: there is no such factory, or it fails, or returns something else.
    """
    found = find(reference)
    model = found if isinstance(found, nn.Module) else called(found, reference)
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a torch.nn.Module from {reference}, got {type(model).__name__}")
    return model


def fill(model: nn.Module, weights: Path) -> None:
    """Copies the weights in a file into a model.

    Args:
        model: changed in place.
        weights: a safetensors file; or one of ``torch.save`` with tensors only, such as a state dict alone or one
            stored with other things under "state_dict", "model_state_dict" or "model". Prefixes that DataParallel and
            torch.compile add to all names are stripped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, or those of another model.
    """
    state = _unwrapped(_read(weights))
    own = model.state_dict()
    places = {n: (t.data_ptr(), t.shape, t.stride()) for n, t in own.items() if t.numel() and not t.is_meta}
    held = {place: state[name] for name, place in places.items() if name in state}
    state = {name: held[place] for name, place in places.items() if place in held} | state  # tied ones may come once
    problems = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": [n for n, v in own.items() if n in state and getattr(state[n], "shape", None) != v.shape],
    }
    said = [f"{kind}: {_few(names)}" for kind, names in problems.items() if names]
    if said:
        raise ValueError(f"expected the weights of {type(model).__name__} in {weights}, but {'; '.join(said)}")
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, found none at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd pickles, which are refused or read
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"expected tensors only in {path}, got a pickle that could run code; save model.state_dict() instead"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"expected a safetensors file or one of torch.save at {path}: {error}") from error


def _unwrapped(state: Any) -> dict[str, Tensor]:
    """The state dict in the contents of a file, with the names of the model itself."""
    if isinstance(state, Mapping):
        state = next((state[key] for key in _NESTED if isinstance(state.get(key), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"a dict with {_few(list(map(str, state)))}" if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"expected a state dict of tensors in the file of weights, got {found}")
    state = {name: value for name, value in state.items() if name != "n_averaged"}  # AveragedModel's
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _few(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
