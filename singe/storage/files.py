"""Files that appear whole or not at all, and are read without executing anything or allocating more than they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import values
from ..digest import digest, raw_bytes

LONGEST_TEXT = 1 << 28
"""Bytes of JSON that are read, 256 MiB: a few hundred times what the plan of a network of 100,000 neurons takes."""

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside ``path``, then renames, so that a reader finds the old file or the new one, whatever happens."""
    part = path.with_name(f".{path.name}.part")  # one left by a killed process is overwritten
    try:
        write(part)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """A text file of no more than ``LONGEST_TEXT`` bytes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is longer, or not UTF-8.
    """
    size = path.stat().st_size
    if size > LONGEST_TEXT:
        raise ValueError(f"expected at most {LONGEST_TEXT} bytes, got {size}")
    return path.read_text(encoding="utf-8")


def create_directory(path: str | os.PathLike[str]) -> Path:
    """A directory, which is created if it does not exist.

    Raises:
        TypeError, ValueError: not a path, or an empty one.
        NotADirectoryError: there is a file of that name.
    """
    found = values.path("directory", path)
    if found.exists() and not found.is_dir():
        raise NotADirectoryError(f"expected a directory, got the file {found}")
    found.mkdir(parents=True, exist_ok=True)
    return found


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming it, for a tensor of a dtype that safetensors does not know."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"expected tensors of dtypes that safetensors knows, got {tensor.dtype} of {name}")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, one tensor after another, so that no second copy of all of them is in memory.

    Raises:
        ValueError: a dtype that the format does not know.
        OSError: it cannot be written.
    """
    check_dtypes(tensors)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # the widest first: all are aligned
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                file.write(raw_bytes(tensors[name]))

    replace(path, write)


@contextmanager
def tensor_file(path: Path) -> Iterator[TensorFile]:
    """Opens a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or becomes so while it is open.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield TensorFile(path, file)
    except SafetensorError as error:
        raise ValueError(f"damaged file {path}: {error}") from error


class TensorFile:
    """An open safetensors file, whose tensors are read one at a time.

    Attributes:
        path: where it is.
        metadata: the text in its header.
        names: of its tensors.
    """

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self._file = path, file
        self.metadata: dict[str, str] = file.metadata() or {}
        self.names = set(file.keys())

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless the file holds tensors of these names, shapes and dtypes, and no others."""
        if self.names != set(tensors):
            raise ValueError(
                f"expected {self.path} to hold the tensors of the model: missing {sorted(set(tensors) - self.names)}, "
                f"unexpected {sorted(self.names - set(tensors))}"
            )
        for name, tensor in tensors.items():
            found = self._file.get_tensor(name)  # a view of the file
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise ValueError(
                    f"expected {name} in {self.path} of shape {tuple(tensor.shape)}, {tensor.dtype}, got "
                    f"{tuple(found.shape)}, {found.dtype}"
                )

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrites tensors with those of their names in the file."""
        for name, tensor in tensors.items():
            tensor.copy_(self._file.get_tensor(name))

    def digest(self, text: str) -> str:
        """See :func:`digest`; of all tensors in the file."""
        return digest(text, _Lazily(self._file, self.names))


class _Lazily(Mapping[str, Tensor]):
    """The tensors of a file, read when asked for."""

    def __init__(self, file: Any, names: set[str]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
