"""Batches as nested tensors: any list, tuple or dict whose tensors all have the samples along axis 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Batch = Any
"""Nested tensors [B, ...]; the pair (x, y) unless the user passes a ``forward``."""


def tensors(batch: Batch) -> list[Tensor]:
    """The tensors of a batch in a fixed order."""
    return pytree.tree_leaves(batch)


def length(batch: Batch) -> int:
    """The number of samples."""
    return len(tensors(batch)[0])


def head(batch: Batch, count: int) -> Batch:
    """The first ``count`` samples."""
    return pytree.tree_map(lambda t: t[:count], batch)


def parts(batch: Batch, count: int) -> Iterator[Batch]:
    """All samples, ``count`` at a time."""
    for start in range(0, length(batch), count):
        yield pytree.tree_map(lambda t, start=start: t[start : start + count], batch)


def joined(batches: Sequence[Batch]) -> Batch:
    """All samples of several batches of one structure.

    Raises:
        ValueError: they differ in more than their length.
    """
    shapes = [pytree.tree_map(lambda t: tuple(t.shape[1:]), batch) for batch in batches]
    for shape in shapes[1:]:
        if shape != shapes[0]:
            raise ValueError(f"expected batches of one shape, got samples of {shapes[0]} and {shape}")
    return pytree.tree_map(lambda *parts: torch.cat(parts), *batches)


def described(batch: Batch) -> str:
    """Shapes and dtypes, nested as the batch is, for messages; of large ones the beginning."""
    text = str(pytree.tree_map(lambda t: f"{tuple(t.shape)} {t.dtype}", batch)).replace("'", "")
    return text if len(text) <= 200 else f"{text[:200]}..."


def copied(batch: Batch) -> Batch:
    """A batch that may be written to."""
    return pytree.tree_map(torch.clone, batch)


def with_dicts(item: Any) -> Any:
    """A batch with mappings that torch's pytree does not know, such as Hugging Face's BatchEncoding, as plain dicts."""
    return pytree.tree_map(
        lambda v: {key: with_dicts(value) for key, value in v.items()} if isinstance(v, Mapping) else v, item
    )
