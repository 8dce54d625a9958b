"""A network as an ONNX file, compared with the network before the file appears."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from .. import checks, values
from ..graph.export import first_line, line_of, quietly
from ..graph.trace import Forward, answer
from ..models.batches import Batch, head, joined, length, tensors
from ..models.isolation import callers_device, plain_torch, preserved_random_state
from ..models.numerics import distance
from ..models.outputs import leaves, with_paths
from ..models.weightnorm import without_weight_norms
from ..models.wrappers import unwrapped
from ..task import Task
from .files import replace

log = logging.getLogger("singe")

LARGEST = 2**31 - 2**20
"""Bytes of weights that fit into one ONNX file: protobuf is limited to 2 GiB."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How far outputs may be from the model's, as a share of the largest; ONNX Runtime fuses and reorders operators."""

_HALF_TOLERANCE = 3e-2

_TALKATIVE = ("torch.onnx", "torch._dynamo", "torch._guards", "onnxscript", "onnx_ir")
"""Loggers of internals that do not concern the user."""


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike[str],
    *,
    forward: Forward | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
) -> Path:
    """Writes a network in eval mode as one ONNX file, which takes any number of samples.

    Where ONNX Runtime is installed the file is run on the example, and on one sample alone where the batch is dynamic,
    and compared with the model; a file whose answers differ is not written.

    Inputs and outputs are named as in the dicts that hold them; a lone tensor is "input" or "output", several
    without names are "input_0", "input_1" and so on. Tensors that the network does not use are no inputs of the file.

    Args:
        model: pruned or not; not modified. If it is wrapped or compiled, the module inside is taken. Weight norms
            become plain weights, masks of single weights become zeros.
        example: inputs x [B, ...] of ``model(x)``, or whatever ``forward`` takes.
        path: of the file, which is replaced; its directory is created. It appears whole or not at all.
        forward: (model, batch) -> outputs, for a model not called as ``model(x)``; a batch is then any nested tensors.
        dynamic_batch: whether the first axis of every input may have any length, or only that of ``example``.
        opset: version of the ONNX operators; torch's choice by default.

    Returns:
        where the file is.

    Raises:
        ImportError: onnx or onnxscript is missing.
        TypeError, ValueError: bad input; or the model cannot be exported, or not for any number of samples, or not to
            this opset.
        RuntimeError: ONNX Runtime's answers differ from the model's.
    """
    _check_installed()
    if opset is not None:
        values.integer("opset", opset, 1)
    if not isinstance(dynamic_batch, bool):
        raise TypeError(f"expected dynamic_batch to be True or False, got {dynamic_batch!r}")
    model, target, task = unwrapped(model), Path(path), Task(forward)
    device = checks.sound_model(model)
    if (size := sum(t.nbytes for t in (*model.parameters(), *model.buffers()))) > LARGEST:
        raise ValueError(f"expected at most {LARGEST} bytes of weights for one ONNX file, got {size}")
    with plain_torch(device), preserved_random_state(), torch.no_grad():
        batch = checks.example(example, device, task)
        work = without_weight_norms(checks.working_copy(model))
        checks.runs(work, batch, task)
        inputs = task.inputs(batch)
        if dynamic_batch and length(inputs) == 1:  # a single sample would be taken for a constant
            inputs = joined([inputs, inputs])
        names = list(_names(inputs, "input", ()))
        names_out = list(_names(answer(work, inputs, task.call), "output", names))
        program = _program(_Flat(work, inputs, task.call), tensors(inputs), dynamic_batch)
        file = _converted(program, names, names_out, dynamic_batch, opset)
        for part in [inputs, head(inputs, 1)] if dynamic_batch else [inputs]:
            _check(file, part, answer(work, part, task.call))
    target.parent.mkdir(parents=True, exist_ok=True)
    replace(target, lambda temporary: temporary.write_bytes(file))
    return target


def _check_installed() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"exporting to ONNX needs {name}: pip install 'singe[onnx]'") from error


class _Flat(nn.Module):
    """A network from its input tensors to its output tensors."""

    def __init__(self, network: nn.Module, example: Batch, forward: Forward) -> None:
        super().__init__()
        self.network = network
        self.eval()
        self._forward, self._spec = forward, pytree.tree_structure(example)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        own = pytree.tree_unflatten([t.clone() for t in inputs], self._spec)  # some models work in place on them
        outputs = self._forward(self.network, own)
        return tuple(value for value in leaves(outputs) if isinstance(value, Tensor))


def _program(network: _Flat, inputs: Sequence[Tensor], dynamic: bool) -> ExportedProgram:
    """The graph of a network."""
    batch = {0: Dim("batch")} if dynamic else None
    shapes = (tuple(batch for _ in inputs),)
    failed: Exception | None = None
    for strict in (False, True):  # strict also follows batch sizes that only the code shows: len(x)
        try:
            with quietly(*_TALKATIVE), callers_device():
                return torch.export.export(network, tuple(inputs), dynamic_shapes=shapes, strict=strict)
        except Exception as error:
            failed = failed or error
    assert failed is not None
    number = "any number of samples (dynamic_batch=False: as many as in the example)" if dynamic else "these inputs"
    raise ValueError(
        f"expected a model that torch.export can trace for {number}, but exporting {type(network.network).__name__} "
        f"failed{line_of(failed)}: {first_line(failed)}"
    ) from failed


def _converted(
    program: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str], dynamic: bool, opset: int | None
) -> bytes:
    """The ONNX file of a program."""
    try:
        with quietly(*_TALKATIVE):
            onnx = torch.onnx.export(
                program, opset_version=opset, input_names=input_names, output_names=output_names, verbose=False,
                dynamic_shapes=(tuple({0: "batch"} for _ in input_names),) if dynamic else None,
            )  # fmt: skip
        assert onnx is not None
        _tidy(onnx.model.graph)
        file: bytes = onnx.model_proto.SerializeToString()
    except Exception as error:
        raise ValueError(f"expected a model of operators that ONNX has, got {_reason(error)}") from error
    if opset is not None and (version := onnx.model.opset_imports[""]) != opset:
        raise ValueError(f"expected a model of operators that opset {opset} has, got one that needs opset {version}")
    return file


def _tidy(graph: Any) -> None:
    """Removes inputs that nothing reads, and frees the names of inputs and outputs."""
    for value in [value for value in graph.inputs if not value.uses()]:
        graph.inputs.remove(value)
    outside = [*graph.inputs, *graph.outputs]
    names, own = {value.name for value in outside}, {id(value) for value in outside}
    for node in graph:
        for value in node.outputs:
            if value.name in names and id(value) not in own:
                value.name = f"inner_{value.name}"


def _reason(error: BaseException) -> str:
    """The message of the innermost of nested errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _tensors(nested: Any) -> list[tuple[tuple[str, ...], Tensor]]:
    """The tensors of a batch or of outputs in a fixed order, with the paths to them."""
    return [(path, leaf) for path, leaf in with_paths(nested) if isinstance(leaf, Tensor)]


def _names(nested: Any, kind: str, taken: Sequence[str]) -> Iterator[str]:
    """A name for each tensor, by the keys that lead to it; none of ``taken``, and none twice."""
    used = set(taken)
    for path, _ in _tensors(nested):
        name = "_".join(path if path and not path[0].isdecimal() else (kind, *path))
        while name in used:
            name = f"{kind}_{name}"
        used.add(name)
        yield name


def _check(file: bytes, inputs: Batch, outputs: Any) -> None:
    """Raises RuntimeError if ONNX Runtime's outputs for ``inputs`` differ from the model's ``outputs``."""
    try:
        import onnxruntime as ort
    except ImportError:
        log.warning("the ONNX file is not compared with the model: pip install onnxruntime")
        return
    given = dict(zip(_names(inputs, "input", ()), tensors(inputs), strict=True))
    try:
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = session.run(None, {value.name: given[value.name].cpu().numpy() for value in session.get_inputs()})
    except Exception as error:
        raise ValueError(f"expected a model that ONNX Runtime can run on the CPU, got {first_line(error)}") from error
    expected = [tensor.detach().cpu() for _, tensor in _tensors(outputs)]
    for value, actual, tensor in zip(session.get_outputs(), map(torch.from_numpy, found), expected, strict=True):
        if actual.shape != tensor.shape:
            problem = f"has shape {tuple(actual.shape)} instead of {tuple(tensor.shape)}"
        elif (gap := distance(actual, tensor)) > _TOLERANCE.get(tensor.dtype, _HALF_TOLERANCE):
            problem = f"differs by {gap:.1e} of its largest value"
        else:
            continue
        raise RuntimeError(
            f"expected ONNX Runtime to answer as the model does, but for {length(inputs)} samples {value.name} "
            f"{problem}"
        )
