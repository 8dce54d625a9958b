"""Fingerprints of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a text and of the names, types and values of tensors, in hexadecimal."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(f"\0{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0".encode())
        found.update(raw_bytes(tensors[name]))
    return found.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values in row-major order."""
    plain = tensor.detach().resolve_conj().resolve_neg()  # what torch conjugates or negates when it is read
    flat = plain.cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data
