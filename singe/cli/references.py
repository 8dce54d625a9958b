"""Objects in the user's code, by name: ``package.module:name``, or called, ``package.module:name(10, depth=3)``."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from typing import Any


def find(reference: str) -> Any:
    """The object that a reference names; modules in the current directory are found first, as with ``python -m``.

    Args:
        reference: a module and a name in it (dots lead on to attributes), maybe called with literals.

    Raises:
        ValueError: it is malformed, there is no such object, its module cannot be imported, or the call fails.
    """
    name, arguments, keywords = _parsed(reference)
    module, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        remark = "; a module is named without .py" if module.endswith(".py") else ""
        raise ValueError(f"cannot import {module} of {reference!r}: {type(error).__name__}: {error}{remark}") from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"expected {attribute!r} in {module} for {reference!r}, found none")
        found = getattr(found, attribute)
    return found if arguments is None else called(found, reference, *arguments, **keywords)


def called(function: Any, reference: str, *arguments: Any, **keywords: Any) -> Any:
    """What the user's function returns.

    Raises:
        ValueError: it raises anything, or is not a function.
    """
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        raise ValueError(f"{reference} failed: {type(error).__name__}: {error}") from error


def _parsed(reference: str) -> tuple[str, list[Any] | None, dict[str, Any]]:
    """The name, and the arguments of the call; None if it is not called."""
    name, bracket, rest = reference.partition("(")
    parts = name.split(":")
    if len(parts) != 2 or not all(part.isidentifier() for side in parts for part in side.split(".")):
        raise ValueError(f"expected package.module:name or package.module:name(...), got {reference!r}")
    if not bracket:
        return name, None, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
        arguments = [ast.literal_eval(value) for value in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
        assert len(keywords) == len(call.keywords)
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"expected literals such as 10, 'A' or depth=3 in the brackets of {reference!r}") from error
    return name, arguments, keywords
