"""How far pruning while training has come, as a state for the checkpoints of a training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .. import values
from ..records import RoundRecord

VERSION = 1


def state_of(
    settings: Mapping[str, Any], sizes: Mapping[str, int], epoch: int, history: Sequence[RoundRecord]
) -> dict[str, Any]:
    """Tensors, numbers and strings; see :func:`read`.

    Args:
        settings: of the pruner.
        sizes: of the groups, by name.
        epoch: how many have ended.
        history: of the rounds.
    """
    return {
        "version": VERSION,
        "settings": dict(settings),
        "groups": dict(sizes),
        "epoch": epoch,
        "history": [_plain(record) for record in history],
    }


def read(
    state: Mapping[str, Any], settings: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[int, list[RoundRecord]]:
    """The epoch and the history in a state.

    Raises:
        ValueError: it is not a state, or one of another model or of other settings.
    """
    try:
        return _read(state, settings, sizes)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"expected what GradualPruner.state_dict returns, got something else: {error!r}") from error


def _read(
    state: Mapping[str, Any], settings: Mapping[str, Any], sizes: Mapping[str, int]
) -> tuple[int, list[RoundRecord]]:
    if state["version"] != VERSION:
        raise ValueError(f"expected a state of version {VERSION}, got version {state['version']!r}")
    if other := [key for key in settings if state["settings"][key] != settings[key]]:
        said = "; ".join(f"{k} was {state['settings'][k]!r} and is {settings[k]!r}" for k in other)
        raise ValueError(f"expected a state of the same settings, but {said}")
    if state["groups"] != sizes:
        raise ValueError(f"expected a state of a model with the groups {sizes}, got one with {state['groups']}")
    history, gone = [_record(data) for data in state["history"]], dict[str, list[int]]()
    for record in history:
        for name, neurons in record.removed.items():
            gone.setdefault(name, []).extend(neurons)
    for name, all_gone in gone.items():
        if not (len(set(all_gone)) == len(all_gone) < sizes[name] and set(all_gone) <= set(range(sizes[name]))):
            raise ValueError(f"expected different neurons of {name}, which has {sizes[name]}, got {all_gone}")
    epoch = values.integer("epoch", state["epoch"], max((record.epoch for record in history), default=0))
    return epoch, history


def _plain(record: RoundRecord) -> dict[str, Any]:
    data = dict(vars(record))
    data["removed"] = {name: torch.tensor(neurons) for name, neurons in record.removed.items()}
    data["scores"] = {name: torch.tensor(s, dtype=torch.float64) for name, s in record.scores.items()}
    return data


def _record(data: Mapping[str, Any]) -> RoundRecord:
    nested = {key: {name: tuple(found.tolist()) for name, found in data[key].items()} for key in ("removed", "scores")}
    return RoundRecord(**{**data, **nested})
