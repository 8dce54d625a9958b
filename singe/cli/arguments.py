"""From the options of the command line to the arguments of ``singe.prune``."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..training.finetune import FineTune
from .references import find

_PASSED = (
    "target", "round_to", "max_rate", "ignore", "structured", "images", "refresh", "precision", "memory",
    "analysis_seconds", "latency_batch", "seed", "progress", "compensate", "compensation_images", "recalibrate_bn",
    "checkpoint",
)  # fmt: skip
_REFERENCES = ("loss", "forward", "evaluate")


def prune_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that were given, all but the model, the loader and rho.

    Raises:
        ValueError: one of them is invalid.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    arguments = {name: given[name] for name in _PASSED if name in given}
    arguments |= {name: find(given[name]) for name in _REFERENCES if name in given}
    if "allocation" in given:
        arguments["allocation"] = allocation(given["allocation"])
    if "criterion" in given:
        name = given["criterion"]
        arguments["criterion"] = find(name) if ":" in name else name
    if "finetune" in given:
        arguments["finetune"] = finetune(given["finetune"])
    return arguments


def allocation(words: Sequence[str]) -> str | dict[str, Any]:
    """A name, or rates by pattern."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    return pairs("allocation", words)


def finetune(words: Sequence[str]) -> FineTune | None:
    """Fine-tuning from ``none`` or from some of its fields."""
    if list(words) == ["none"]:
        return None
    given, known = pairs("finetune", words), [field.name for field in fields(FineTune)]
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"expected {', '.join(known)} in finetune, got {', '.join(unknown)}")
    return FineTune(**given)


def pairs(option: str, words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words: numbers are numbers, ``none`` is None, all else is text.

    Raises:
        ValueError: a word without =, or a name twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name in found:
            raise ValueError(f"expected NAME=VALUE words for {option}, each name once, got {word!r}")
        found[name] = None if value == "none" else _number(value)
    return found


def _number(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float)) else text
