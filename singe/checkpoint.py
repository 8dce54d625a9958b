"""Files: a plan as JSON, weights as safetensors, nothing that executes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .copies import copy_of
from .graph.trace import named_tensors
from .plan import Plan
from .wrappers import unwrapped

PLAN_FILE = "plan.json"
WEIGHTS_FILE = "model.safetensors"


def save(model: nn.Module, plan: Plan, directory: str | os.PathLike[str]) -> None:
    """Writes a pruned model as ``plan.json`` and ``model.safetensors``; each file appears whole or not at all.

    Args:
        model: the pruned model.
        plan: what was removed from the unpruned one.
        directory: created if it does not exist; files in it are replaced.

    Raises:
        ValueError: the model has state that is no tensor (``get_extra_state``).
    """
    extra = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if extra:
        raise ValueError(f"expected a model whose state is tensors only, got {', '.join(extra)}")
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: _alone(tensor.detach()) for name, tensor in _unique(model).items()}
    _replace(path / WEIGHTS_FILE, lambda part: save_file(weights, part, metadata={"format": "pt"}))
    text = json.dumps(plan.to_json(), separators=(",", ":"))
    _replace(path / PLAN_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def load(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """A pruned copy of ``model`` from the files that ``PruneResult.save`` wrote.

    Args:
        model: of the same architecture as the one that was pruned, unpruned; its weights do not matter. Not modified.
            Wrapped or compiled, the module inside is taken.
        directory: holds ``plan.json`` and ``model.safetensors``.

    Returns:
        the pruned model, on the device and in the train mode of ``model``.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another version, or does not fit the model.
    """
    model = unwrapped(model)
    path = Path(directory)
    pruned = load_plan(path).apply(copy_of(model))
    tensors = _unique(pruned)
    try:
        with safe_open(path / WEIGHTS_FILE, framework="pt") as file, torch.no_grad():
            _check_names(set(file.keys()), set(tensors), path / WEIGHTS_FILE)
            for name, tensor in tensors.items():
                _copy(name, file.get_tensor(name), tensor)
    except SafetensorError as error:
        raise ValueError(f"damaged weights in {path / WEIGHTS_FILE}: {error}") from error
    return pruned


def load_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan alone, to apply to a model of one's own.

    Raises:
        FileNotFoundError: no ``plan.json`` in the directory.
        ValueError: it is damaged or of another version.
    """
    path = Path(directory) / PLAN_FILE
    try:
        return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged plan in {path}: {error}") from error


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones under their first name only."""
    persistent = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    unique = {}
    for name, tensor in named_tensors(model).items():
        if name in persistent and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def _alone(tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it: contiguous, in storage of its own."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _check_names(found: set[str], expected: set[str], path: Path) -> None:
    if found != expected:
        raise ValueError(
            f"expected {path} to hold the tensors of the model: missing {sorted(expected - found)}, "
            f"unexpected {sorted(found - expected)}"
        )


def _copy(name: str, source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ValueError(
            f"expected {name} of shape {tuple(target.shape)}, {target.dtype}, got {tuple(source.shape)}, {source.dtype}"
        )
    target.copy_(source)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside ``path``, then renames, so that a reader never sees half a file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
