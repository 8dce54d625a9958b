"""From a model to its ATen graph with ``torch.export``, without its messages and without memory that it would keep."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import operator
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.fx import graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..memory import raise_shortage
from ..models.batches import copied
from ..models.isolation import callers_device
from ..models.outputs import Form, leaves
from .nodes import MODEL
from .operators import aten

Forward = Callable[[nn.Module, Any], Any]
"""(model, inputs) -> outputs, with inputs any nested tensors [B, ...]."""

_DERIVABLE: dict[Any, Callable[..., Any]] = {
    aten.copy.default: lambda x, source, *_, **__: source.to(x.dtype).expand(x.shape).contiguous(),
}
"""Operators that have no derivative -> others that compute the same."""

_SHAPES = "torch.fx.experimental.symbolic_shapes"
"""The logger that complains about batch axes which cannot be dynamic."""


def exported(model: nn.Module, inputs: Any, forward: Forward) -> tuple[ExportedProgram, Form]:
    """The graph of ``forward(model, inputs)``: functional, and with a dynamic batch axis where possible.

    Returns:
        the graph, whose outputs are the values in the model's outputs, one by one; and the form of these.

    Raises:
        ValueError: the model cannot be exported; names the model, the line and export's reason.
    """
    tensors, spec = pytree.tree_flatten(copied(inputs))
    try:
        with torch.no_grad(), quietly(_SHAPES), _caches_as_before(), _cycles_broken() as inside:
            call = _Call(model, forward, spec, inside)
            shapes = (tuple({0: Dim.AUTO} for _ in tensors),)
            program = export(call, tuple(tensors), dynamic_shapes=shapes, strict=False).run_decompositions(_DERIVABLE)
            for name in program.graph_signature.inputs_to_lifted_custom_objs.values():
                raise ValueError(f"it uses a {type(program.constants[name]).__name__}, which a graph of tensors cannot")
            for node in (node for node in program.graph.nodes if node.op == "get_attr"):
                raise ValueError(f"it uses {next(iter(node.users)).name}, which takes a graph of its own")
    except Exception as error:
        raise_shortage(error)
        raise ValueError(
            f"expected a model that torch.export can trace, but exporting {type(model).__name__} on inputs of shape "
            f"{', '.join(str(tuple(t.shape)) for t in tensors)} failed{line_of(error)}: {first_line(error)}"
        ) from error
    _restore_batch_norm(program.graph)
    _infer_flattened_widths(program.graph)
    return program, call.form


_KNOWN = (Tensor, bool, int, float, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)
"""What outputs may hold for ``torch.export``."""


class _Call(nn.Module):
    """Gives every model one signature: its input and output tensors one by one, in order.

    Records the mode it is called in, and keeps the form of the outputs.
    """

    form: Form

    def __init__(
        self, model: nn.Module, forward: Forward, spec: pytree.TreeSpec, inside: Callable[[FakeTensorMode | None], None]
    ) -> None:
        super().__init__()
        self.add_module(MODEL, model)
        self.training = model.training
        self._forward, self._spec = forward, spec
        self._inside = inside

    def forward(self, *tensors: Tensor) -> Any:
        self._inside(detect_fake_mode(tensors))
        with callers_device(), GradientsAsTheyAre():
            outputs = self._forward(self.get_submodule(MODEL), pytree.tree_unflatten(tensors, self._spec))
        self.form, values = Form(outputs), tuple(leaves(outputs))
        for value in values:
            if not isinstance(value, _KNOWN):
                raise TypeError(
                    f"it returns a {type(value).__name__}, which is no tensor and no list, tuple, dict or dataclass "
                    "of tensors; a forward= can take out what it holds"
                )
        return values


class GradientsAsTheyAre(TorchFunctionMode):
    """Drops a model's own switches of gradients: where they are on, export would put detaching operators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch._C._set_grad_enabled else func(*args, **(kwargs or {}))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the pages that may follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def quietly(*loggers: str) -> Iterator[None]:
    """Keeps export from reporting its internals to the user, through these loggers, warnings or stderr."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _caches_as_before() -> Iterator[None]:
    """Removes entries that an export adds to torch's caches, which grow from call to call and are never used again."""
    sources: dict[Any, Any] = graph_module._loader.eval_cache
    caches: list[dict[Any, Any]] = [FakeTensorMode.cache, sources, linecache.cache]
    before = [set(cache) for cache in caches]
    try:
        yield
    finally:
        for cache, keys in zip(caches, before, strict=True):
            for key in cache.keys() - keys:
                cache.pop(key, None)  # another thread may have done it
        for method in vars(ShapeEnv).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()


@contextlib.contextmanager
def _cycles_broken() -> Iterator[Callable[[FakeTensorMode | None], None]]:
    """Frees the symbolic shapes of the modes that are passed to it.

    They hold the inputs, which hold their sizes in C++, where Python's garbage collector does not see them.
    """
    modes: list[FakeTensorMode | None] = []
    try:
        yield modes.append
    finally:
        for mode in modes:
            if mode is not None and mode.shape_env is not None:
                mode.shape_env.tracked_fakes = None


def line_of(error: BaseException) -> str:
    """Where in the user's code an export failed: the innermost line outside of torch and this package."""
    while error.__cause__ is not None:
        error = error.__cause__
    own = tuple(os.path.join(os.path.dirname(p), "") for p in (torch.__file__, os.path.dirname(__file__)))
    lines = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*own, "<"))]
    return f" at {lines[-1].filename}:{lines[-1].lineno} ({lines[-1].line})" if lines else ""


def _restore_batch_norm(graph: fx.Graph) -> None:
    """Puts ``aten.batch_norm`` back where decomposition left a triple of results with one used."""
    for node in list(graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        x, weight, bias, mean, var, momentum, eps = node.args
        with graph.inserting_before(node):
            whole = graph.call_function(
                aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False)
            )
        whole.meta = {**node.meta, "val": node.meta["val"][0]}
        for item in list(node.users):
            if item.target is operator.getitem and item.args[1] == 0:
                item.replace_all_uses_with(whole)
            graph.erase_node(item)
        graph.erase_node(node)


def _infer_flattened_widths(graph: fx.Graph) -> None:
    """Lets flattening to [batch, width] infer the width that export wrote down, so that a cut does not break it."""
    for node in graph.nodes:
        if node.target is aten.view.default:
            x, shape = node.args
            if len(shape) == 2 and shape[0] != -1 and isinstance(shape[1], int):
                node.args = (x, [shape[0], -1])
