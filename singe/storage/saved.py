"""A pruned network on disk: the plan as JSON, weights as safetensors, nothing that executes; see docs/format.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checks, values
from ..digest import digest
from ..graph.groups import qualified
from ..graph.trace import named_tensors
from ..models.copies import copy_of
from ..models.wrappers import unwrapped
from ..removal import masks
from ..removal.plan import Plan
from .files import check_dtypes, create_directory, read_text, replace, tensor_file, write_tensors

PLAN_FILE = "plan.json"
MASKS_FILE = "masks.safetensors"
WEIGHTS_FILE = "model.safetensors"

_NO_EXTRA_STATE = nn.Module.get_extra_state


def save(model: nn.Module, plan: Plan, directory: str | os.PathLike[str]) -> None:
    """Writes a pruned model as ``plan.json`` and ``model.safetensors``; each file appears whole or not at all.

    Args:
        model: the pruned model.
        plan: what was removed from the unpruned one.
        directory: created if it does not exist; files in it are replaced.

    Raises:
        ValueError: the model has state that is no tensor (``get_extra_state``).
    """
    path = _made(model, directory)
    text = json.dumps(plan.to_json(), separators=(",", ":"))
    # a process may be killed between the two files: the weights record which plan they belong to
    write_tensors(path / WEIGHTS_FILE, _persistent(model), {"format": "pt", "plan": digest(text, {})})
    replace(path / PLAN_FILE, lambda part: part.write_text(text, encoding="utf-8"))
    (path / MASKS_FILE).unlink(missing_ok=True)  # of another result


def save_masked(model: nn.Module, kept: masks.Masks, directory: str | os.PathLike[str]) -> None:
    """Writes a model with single weights masked as ``masks.safetensors`` and ``model.safetensors``.

    Args:
        model: the pruned model, with masks on or off.
        kept: parameter name -> bool tensor, True for weights that stay.
        directory: created if it does not exist; files in it are replaced.

    Raises:
        ValueError: the model has state that is no tensor (``get_extra_state``).
    """
    path, permanent = _made(model, directory), not masks.are_on(model, kept)
    bare = model if permanent else masks.take_off(copy_of(model), kept)
    write_tensors(path / WEIGHTS_FILE, _persistent(bare), {"format": "pt", "masks": digest("", kept)})
    write_tensors(path / MASKS_FILE, kept, {"format": "pt", "permanent": json.dumps(permanent)})
    (path / PLAN_FILE).unlink(missing_ok=True)


def load(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """A pruned copy of ``model`` from the files that ``PruneResult.save`` or ``SparseResult.save`` wrote.

    Args:
        model: of the same architecture as the one that was pruned, unpruned; its weights do not matter. Not modified.
            If it is wrapped or compiled, the module inside is taken.
        directory: holds ``model.safetensors`` and ``plan.json`` or ``masks.safetensors``.

    Returns:
        the pruned model, on the device and in the train mode of ``model``; with masks on, unless they were made
        permanent before it was saved.

    Raises:
        TypeError: ``directory`` is no path.
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, of another version, does not fit the model, or is from another save; or the
            model is on the meta device.
    """
    model, path = unwrapped(model), values.path("directory", directory)
    checks.real_weights(model)
    if (path / MASKS_FILE).exists():
        return _load_masked(copy_of(model), path)
    text, plan = _read_plan(path / PLAN_FILE)
    pruned = plan.apply(copy_of(model))
    _read_weights(pruned, path, "plan", digest(text, {}))
    return pruned


def load_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan alone, to apply to your own model.

    Raises:
        FileNotFoundError: no ``plan.json`` in the directory.
        ValueError: it is damaged or of another version.
    """
    path = values.path("directory", directory)
    if (path / MASKS_FILE).exists() and not (path / PLAN_FILE).exists():
        raise FileNotFoundError(f"expected {PLAN_FILE} in {path}, got {MASKS_FILE}, of single weights: use singe.load")
    return _read_plan(path / PLAN_FILE)[1]


def _load_masked(model: nn.Module, path: Path) -> nn.Module:
    """Fills and masks a model in place."""
    parameters = dict(model.named_parameters())
    with tensor_file(path / MASKS_FILE) as file:
        if unknown := file.names - set(parameters):
            raise ValueError(f"expected masks of the model's parameters in {file.path}, got {sorted(unknown)}")
        kept = {name: torch.empty(parameters[name].shape, dtype=torch.bool) for name in file.names}
        file.check(kept)
        file.copy(kept)
        permanent = file.metadata.get("permanent") == "true"
    _read_weights(model, path, "masks", digest("", kept))
    for name, mask in kept.items():
        kept[name] = mask.to(parameters[name].device)
        masks.zero_out(parameters[name], kept[name])
    return model if permanent else masks.put_on(model, kept)


def _read_weights(model: nn.Module, path: Path, beside: str, own: str) -> None:
    """Copies the weights in a directory into a model, unless they were saved beside another plan or other masks."""
    tensors = _persistent(model)
    with tensor_file(path / WEIGHTS_FILE) as file:
        if file.metadata.get(beside, own) != own:
            other = {"plan": f"{PLAN_FILE} beside it, it was saved with another plan"}
            other["masks"] = f"{MASKS_FILE} beside it, it was saved with other masks"
            raise ValueError(f"expected {file.path} to be of {other[beside]}")
        file.check(tensors)
        file.copy(tensors)


def check(model: nn.Module) -> None:
    """Raises ValueError unless a model, pruned or not, can be saved."""
    own = [name for name, module in model.named_modules() if type(module).get_extra_state is not _NO_EXTRA_STATE]
    if own:
        named = ", ".join(f"{name}._extra_state".removeprefix(".") for name in own)
        raise ValueError(f"expected a model whose state is tensors only, got {named}")
    check_dtypes(_persistent(model))


def _made(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """The directory, for a model that can be saved."""
    check(model)
    return create_directory(directory)


def _read_plan(path: Path) -> tuple[str, Plan]:
    if not path.exists():
        raise FileNotFoundError(
            f"expected what result.save wrote in {path.parent}, {PLAN_FILE} or {MASKS_FILE} beside {WEIGHTS_FILE}, got "
            + ("neither of them" if path.parent.is_dir() else "no such directory")
        )
    try:
        text = read_text(path)
        return text, Plan.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged plan in {path}: {error}") from error


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones under their first name only.

    Not what ``state_dict`` says, which hooks may have rewritten.
    """
    passing = {
        qualified(prefix, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    seen: set[int] = set()
    unique = {}
    for name, tensor in named_tensors(model).items():
        if name not in passing and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique
