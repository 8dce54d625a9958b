"""A pruned network on disk: the plan as JSON, weights as safetensors, nothing that executes; see docs/format.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

from torch import Tensor, nn

from .copies import copy_of
from .files import digest, read_text, replace, tensor_file, write_tensors
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
    text = json.dumps(plan.to_json(), separators=(",", ":"))
    # between the two files a process may be killed: the weights know which plan they are of
    write_tensors(path / WEIGHTS_FILE, _persistent(model), {"format": "pt", "plan": digest(text, {})})
    replace(path / PLAN_FILE, lambda part: part.write_text(text, encoding="utf-8"))


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
        ValueError: a file is damaged, of another version, does not fit the model, or is not of the same saving.
    """
    path = Path(directory)
    text, plan = _read_plan(path / PLAN_FILE)
    pruned = plan.apply(copy_of(unwrapped(model)))
    tensors = _persistent(pruned)
    with tensor_file(path / WEIGHTS_FILE) as file:
        if file.metadata.get("plan", own := digest(text, {})) != own:
            raise ValueError(f"expected {file.path} to be of {PLAN_FILE} beside it, it was saved with another plan")
        file.check(tensors)
        file.copy(tensors)
    return pruned


def load_plan(directory: str | os.PathLike[str]) -> Plan:
    """The plan alone, to apply to a model of one's own.

    Raises:
        FileNotFoundError: no ``plan.json`` in the directory.
        ValueError: it is damaged or of another version.
    """
    return _read_plan(Path(directory) / PLAN_FILE)[1]


def _read_plan(path: Path) -> tuple[str, Plan]:
    try:
        text = read_text(path)
        return text, Plan.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged plan in {path}: {error}") from error


def _persistent(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones under their first name only."""
    persistent = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    unique = {}
    for name, tensor in named_tensors(model).items():
        if name in persistent and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique
