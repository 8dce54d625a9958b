"""One exported graph of the model, executed with the model's live parameters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from ..memory import raise_shortage
from ..models.batches import copied, head, joined, length
from ..models.copies import forget_passes
from ..models.isolation import callers_device
from ..models.numerics import close
from ..models.outputs import Form, leaves
from ..models.widths import integers
from .export import Forward, exported
from .nodes import MODEL, packet_of
from .operators import CONVOLUTIONS, TRANSPOSED, aten

Env = dict[fx.Node, Any]


_STRIDED = (aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype)
"""Operators whose result depends on how their argument lies in memory."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has, so that tied ones appear once per name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def plain_call(model: nn.Module, x: Any) -> Any:
    """``model(x)``: how a model is called unless the user says otherwise."""
    return model(x)


def answer(model: nn.Module, inputs: Any, forward: Forward = plain_call) -> Any:
    """``forward(model, inputs)`` on a copy of the inputs, since some models work in place on them."""
    with callers_device():
        return forward(model, copied(inputs))


def evaluate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a node's operator on values in any memory format.

    The number of groups of convolutions and group norms follows from their operands, since they lose whole groups.
    """
    operator_: Callable[..., Any] = node.target  # type: ignore[assignment]
    packet = packet_of(node)
    if packet in CONVOLUTIONS and len(args) > 6:
        args = (*args[:6], args[0].shape[1] // args[1].shape[1])
    elif packet in TRANSPOSED and len(args) > 6 and args[6] == node.args[1].meta["val"].shape[0]:  # type: ignore
        args = (*args[:6], args[0].shape[1], *args[7:])
    elif packet is aten.group_norm:
        args = (args[0], args[0].shape[1] * args[1] // node.args[0].meta["val"].shape[1], *args[2:])  # type: ignore
    if operator_ in (aten.view.default, aten._unsafe_view.default):
        operator_ = aten.reshape
    elif operator_ in _STRIDED:
        args = (args[0].contiguous(), *args[1:])
    return operator_(*args, **kwargs)


class Trace:
    """The ATen graph of a model in one of its modes, functional and with a dynamic batch axis where possible.

    Attributes:
        nodes: the operators in execution order.
        inputs: the nodes of the input tensors.
        outputs: the nodes of the model's outputs that are tensors.
        state: for every node that stands for a parameter or buffer, its qualified name in the model.
        buffers: the names among them of buffers.
        constants: tensors that export lifted out of the code, by node.
        dynamic: whether the graph takes any number of samples, or only that of the example.
        example_batch: a number of samples that it takes.
        integers: the values of integer buffers and of constants, by node: indices do not change while weights do.
        attributes: integer attributes that code may use as a width and that no tensor implies, by module name.
    """

    def __init__(self, program: ExportedProgram, form: Form, model: nn.Module, forward: Forward, example: Any) -> None:
        self._form, self._forward = form, forward
        self._nesting = pytree.tree_structure(example)
        names = _first_names(model)
        signature = program.graph_signature
        placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        # assertions that export inserts have no value
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        self.nodes: list[fx.Node] = [n for n in calls if "val" in n.meta]
        self.inputs: list[fx.Node] = [placeholders[str(name)] for name in signature.user_inputs]
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.state: dict[fx.Node, str] = {
            placeholders[k]: names[name.removeprefix(f"{MODEL}.")] for k, name in named.items()
        }
        self.buffers = {self.state[placeholders[k]] for k in signature.inputs_to_buffers}
        self.constants: Env = {
            placeholders[k]: program.constants[name] for k, name in signature.inputs_to_lifted_tensor_constants.items()
        }
        tensors = named_tensors(model)
        self.integers: Env = self.constants | {
            node: tensors[name] for node, name in self.state.items() if not tensors[name].is_floating_point()
        }
        self.attributes: dict[str, dict[str, int]] = {n: _integers(m) for n, m in model.named_modules()}
        returned = zip(program.graph.output_node().args[0], signature.output_specs, strict=True)
        self._returned = [value for value, spec in returned if spec.kind is OutputKind.USER_OUTPUT]
        self.outputs: list[fx.Node] = [v for v in self._returned if isinstance(v, fx.Node) and not self.is_size(v)]
        self.dynamic: bool = all(self.batch_axes(node) for node in self.inputs if node.users)
        self.example_batch: int = 2 if self.dynamic else length(example)

    # -- shapes ---------------------------------------------------------------------------------------------

    def size(self, value: int | torch.SymInt, batch: int | None = None) -> int:
        """A possibly symbolic integer at a batch of ``batch`` samples, by default those of the example."""
        if isinstance(value, torch.SymInt):
            return _size_at(value.node.expr, self.example_batch if batch is None else batch)
        return value

    def concrete(self, shape: Iterable[int | torch.SymInt], batch: int | None = None) -> tuple[int, ...]:
        """A possibly symbolic shape at a batch of ``batch`` samples, by default those of the example."""
        return tuple(self.size(s, batch) for s in shape)

    def shape(self, node: fx.Node, batch: int | None = None) -> tuple[int, ...]:
        """Shape of a tensor-valued node at a batch of ``batch`` samples, by default those of the example."""
        return self.concrete(node.meta["val"].shape, batch)

    def batch_axes(self, node: fx.Node) -> list[int]:
        """The axes of a node's value whose size depends on the batch."""
        return [i for i, s in enumerate(node.meta["val"].shape) if _is_symbolic(s)]

    @staticmethod
    def is_size(node: fx.Node) -> bool:
        """Whether a node is an integer computed from shapes rather than a tensor."""
        return isinstance(node.meta.get("val"), (int, torch.SymInt))

    def nbytes(self, nodes: Iterable[fx.Node], batch: int | None = None) -> int:
        """Bytes held by the tensor values of ``nodes`` at a batch of ``batch`` samples, by default the example's."""
        return sum(
            math.prod(self.concrete(value.shape, batch)) * value.element_size()
            for node in nodes
            for value in pytree.tree_leaves(node.meta["val"])
            if isinstance(value, Tensor)
        )

    def samples_within(self, room: int, nbytes: int) -> int:
        """How many samples may pass at a time, at least one; those of the example where the graph takes no others.

        Args:
            room: bytes.
            nbytes: bytes that the example's samples take.
        """
        return max(1, room * self.example_batch // max(1, nbytes)) if self.dynamic else self.example_batch

    def largest(self) -> int:
        """Bytes of the largest value for the example's samples."""
        return max(self.nbytes([node]) for node in self.nodes)

    def whole_batches(self, samples: int) -> int:
        """The least number of samples, at least so many, that passes as batches which the graph takes."""
        step = 1 if self.dynamic else self.example_batch
        return -(-samples // step) * step

    # -- structure ------------------------------------------------------------------------------------------

    def calls(self, parameter: str) -> list[fx.Node]:
        """The operators that take ``parameter`` as an argument, in execution order."""
        return [n for n in self.nodes if any(self.state.get(i) == parameter for i in n.all_input_nodes)]

    def downstream(self, parameters: Collection[str]) -> list[fx.Node]:
        """The operators whose values depend on any of some parameters and buffers, in execution order."""
        found: dict[fx.Node, None] = {}
        for node in self.nodes:
            if any(i in found or self.state.get(i) in parameters for i in node.all_input_nodes):
                found[node] = None
        return list(found)

    def used(self) -> list[str]:
        """Qualified names of the parameters and buffers that some operator takes."""
        return [name for node, name in self.state.items() if node.users]

    def parameter(self, node: fx.Node, index: int, name: str) -> str | None:
        """Qualified name of the parameter an operator takes at ``index`` (or as ``name``), None where absent."""
        value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        return self.state.get(value) if isinstance(value, fx.Node) else None

    # -- execution ------------------------------------------------------------------------------------------

    def feed(self, inputs: Any) -> Env:
        """The values of ``inputs``: what the model is called with, nested as in the example; dicts in any order."""
        return dict(zip(self.inputs, self._nesting.flatten_up_to(inputs), strict=True))

    def live(self, model: nn.Module) -> Env:
        """The values of every parameter, buffer and constant as they stand in ``model`` now, detached."""
        tensors = named_tensors(model)
        return {n: tensors[name].detach() for n, name in self.state.items()} | self.constants

    def run(
        self,
        nodes: Sequence[fx.Node],
        env: Env,
        batch: int,
        *,
        keep: Iterable[fx.Node] = (),
        call: Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any] = evaluate,
    ) -> None:
        """Executes ``nodes`` in order inside ``env``, dropping values after their last use.

        Args:
            nodes: operators whose inputs are in ``env`` or come earlier in ``nodes``.
            env: node -> value; results are added to it.
            batch: number of samples the values in ``env`` hold; every symbolic size follows from it.
            keep: nodes whose values must stay in ``env``.
            call: evaluates ``node`` on its arguments in place of the operator itself.
        """
        last_use = {i: n for n in nodes for i in n.all_input_nodes}
        produced, kept = set(nodes), set(keep)

        def argument(node: fx.Node) -> Any:
            return self.size(node.meta["val"], batch) if self.is_size(node) else env[node]

        for node in nodes:
            if self.is_size(node):
                continue
            args = fx.map_arg(node.args, argument)
            kwargs = fx.map_arg(node.kwargs, argument)
            env[node] = call(node, args, kwargs)
            for used in node.all_input_nodes:
                if last_use[used] is node and used in produced and used not in kept:
                    env.pop(used, None)

    def holds_for(self, model: nn.Module, inputs: Any) -> bool:
        """Whether the graph still gives the model's outputs; cutting a model can contradict a width in the graph."""
        env: Env = self.live(model) | self.feed(inputs)
        with torch.no_grad():
            expected = [v for v in leaves(answer(model, inputs, self._forward)) if isinstance(v, Tensor)]
            try:
                self.run(self.nodes, env, length(inputs), keep=self.outputs)
            except (RuntimeError, IndexError) as error:
                raise_shortage(error)
                return False
        return all(close(env[node], value) for node, value in zip(self.outputs, expected, strict=True))

    def unflatten(self, values: Sequence[Tensor], batch: int) -> Any:
        """The model's output as the user sees it, from the values of ``outputs`` for ``batch`` samples."""
        tensors = dict(zip(self.outputs, values, strict=True))

        def value(of: Any) -> Any:
            if not isinstance(of, fx.Node):
                return of
            return self.size(of.meta["val"], batch) if self.is_size(of) else tensors[of]

        return self._form.build(value(of) for of in self._returned)


def trace(model: nn.Module, inputs: Any, forward: Forward = plain_call) -> Trace:
    """Exports ``forward(model, inputs)`` once, in the mode that the model is in.

    Args:
        model: any module that ``torch.export`` can trace.
        inputs: nested tensors [B, ...], B >= 1; the tensor x where ``forward`` is left out.
        forward: how the model is called.

    Raises:
        ValueError: the model cannot be exported; names the model, the line and export's reason.
    """
    forget_passes(model)  # the graph has to have the weights, not what was computed of them
    pair = head(inputs, 2) if length(inputs) > 1 else joined([inputs, inputs])
    with contextlib.suppress(ValueError):
        first = Trace(*exported(model, pair, forward), model, forward, pair)
        if first.dynamic or length(inputs) == 2:
            return first
    return Trace(*exported(model, inputs, forward), model, forward, inputs)


def _integers(module: nn.Module) -> dict[str, int]:
    """Integer attributes that may be widths and that no tensor of a module implies."""
    bare_norm = isinstance(module, _NormBase | nn.GroupNorm) and not [*module.parameters(), *module.buffers()]
    if type(module).__module__.startswith("torch.") and not (bare_norm or isinstance(module, nn.Unflatten)):
        return {}
    return {name: value for name, value in integers(module).items() if not name.startswith("_")}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> its first name, which is the one the model's modules list."""
    tensors = named_tensors(model)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in tensors.items()}


@lru_cache(maxsize=4096)  # the same sizes in every pass
def _size_at(expression: Any, batch: int) -> int:
    """What an expression of symbolic sizes comes to for a number of samples."""
    return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))


def _is_symbolic(size: int | torch.SymInt) -> bool:
    """Whether a size depends on the batch; export keeps some constants as symbolic integers too."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)
