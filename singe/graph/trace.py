"""One exported graph of the model, executed with the model's live parameters."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from ..numerics import close

aten = torch.ops.aten

Env = dict[fx.Node, Any]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it goes by, so that tied ones appear once a name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def forward(model: nn.Module, x: Tensor) -> Any:
    """``model(x)`` on a copy of x, since some models work in place on their input."""
    return model(x.clone())


def evaluate(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a node's operator."""
    operator_: Callable[..., Any] = node.target  # type: ignore[assignment]
    return operator_(*args, **kwargs)


class Trace:
    """The ATen graph of ``model(x)`` in eval mode, functional and with a dynamic batch axis where possible.

    Attributes:
        nodes: the operators in execution order.
        input: the node of ``x``.
        outputs: the nodes of the model's outputs that are tensors.
        state: for every node that stands for a parameter or buffer, its qualified name in the model.
        constants: tensors that export lifted out of the code, by node.
        batch_symbol: the symbolic batch size, or None where export had to fix it to that of the example.
    """

    def __init__(self, program: ExportedProgram, names: Mapping[str, str]) -> None:
        signature = program.graph_signature
        _restore_batch_norm(program.graph)
        _infer_flattened_widths(program.graph)
        placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        self.nodes: list[fx.Node] = [n for n in program.graph.nodes if n.op == "call_function"]
        self.input: fx.Node = placeholders[signature.user_inputs[0]]
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.state: dict[fx.Node, str] = {
            placeholders[k]: names[name.removeprefix(_OneInput.PREFIX)] for k, name in named.items()
        }
        self.constants: Env = {
            placeholders[k]: program.constants[name] for k, name in signature.inputs_to_lifted_tensor_constants.items()
        }
        returned = zip(program.graph.output_node().args[0], signature.output_specs, strict=True)
        self._outputs = [value for value, spec in returned if spec.kind is OutputKind.USER_OUTPUT]
        self.outputs: list[fx.Node] = [v for v in self._outputs if isinstance(v, fx.Node) and not self.is_size(v)]
        self._out_spec = program.call_spec.out_spec
        size = self.input.meta["val"].shape[0]
        self.batch_symbol = size.node.expr if _is_symbolic(size) else None
        self.example_batch: int = 2 if self.batch_symbol is not None else int(size)

    # -- shapes ---------------------------------------------------------------------------------------------

    def size(self, value: int | torch.SymInt, batch: int) -> int:
        """A possibly symbolic integer at a batch of ``batch`` samples."""
        if isinstance(value, torch.SymInt):
            expression = value.node.expr
            return int(expression.subs({self.batch_symbol: batch}) if expression.free_symbols else expression)
        return value

    def shape(self, node: fx.Node, batch: int) -> tuple[int, ...]:
        """Shape of a tensor-valued node at a batch of ``batch`` samples."""
        return tuple(self.size(s, batch) for s in node.meta["val"].shape)

    def batch_axes(self, node: fx.Node) -> list[int]:
        """The axes of a node's value whose size depends on the batch."""
        return [i for i, s in enumerate(node.meta["val"].shape) if _is_symbolic(s)]

    @staticmethod
    def is_size(node: fx.Node) -> bool:
        """Whether a node is an integer computed from shapes rather than a tensor."""
        return isinstance(node.meta.get("val"), (int, torch.SymInt))

    def nbytes(self, nodes: Iterable[fx.Node], batch: int) -> int:
        """Bytes held by the tensor values of ``nodes`` at a batch of ``batch`` samples."""
        total = 0
        for node in nodes:
            for value in pytree.tree_leaves(node.meta["val"]):
                if isinstance(value, Tensor):
                    count = 1
                    for s in value.shape:
                        count *= self.size(s, batch)
                    total += count * value.element_size()
        return total

    # -- structure ------------------------------------------------------------------------------------------

    def calls(self, parameter: str) -> list[fx.Node]:
        """The operators that take ``parameter`` as an argument, in execution order."""
        return [n for n in self.nodes if any(self.state.get(i) == parameter for i in n.all_input_nodes)]

    def parameter(self, node: fx.Node, index: int, name: str) -> str | None:
        """Qualified name of the parameter an operator takes at ``index`` (or as ``name``), None where absent."""
        value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        return self.state.get(value) if isinstance(value, fx.Node) else None

    # -- execution ------------------------------------------------------------------------------------------

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

    def holds_for(self, model: nn.Module, x: Tensor) -> bool:
        """Whether running the graph still gives ``model(x)``; cutting a model can break a width the graph holds."""
        env: Env = {**self.live(model), self.input: x}
        with torch.no_grad():
            expected = [v for v in pytree.tree_leaves(forward(model, x)) if isinstance(v, Tensor)]
            try:
                self.run(self.nodes, env, len(x), keep=self.outputs)
            except (RuntimeError, IndexError):
                return False
        return all(close(env[node], value) for node, value in zip(self.outputs, expected, strict=True))

    def unflatten(self, values: Sequence[Tensor], batch: int) -> Any:
        """The model's output as the user sees it, from the values of ``outputs`` for ``batch`` samples."""
        tensors = dict(zip(self.outputs, values, strict=True))

        def value(of: Any) -> Any:
            if not isinstance(of, fx.Node):
                return of
            return self.size(of.meta["val"], batch) if self.is_size(of) else tensors[of]

        return pytree.tree_unflatten([value(of) for of in self._outputs], self._out_spec)


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Exports ``model(x)`` once; the model must be in eval mode.

    Args:
        model: any module that ``torch.export`` can trace.
        x: float tensor [B, ...], B >= 1.

    Raises:
        ValueError: the model cannot be exported; names the model and export's reason.
    """
    pair = x[:2] if len(x) > 1 else torch.cat([x, x])
    with contextlib.suppress(ValueError):
        first = _export(model, pair)
        if first.batch_symbol is not None or len(x) == 2:
            return first
    return _export(model, x)


class _OneInput(nn.Module):
    """Gives every model the signature (x), whatever its own (*args, wrappers)."""

    PREFIX = "model."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def place_of(node: fx.Node) -> str:
    """Name of the innermost module that a node stands in; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [name for name, _ in stack.values()][-1:] or [""]
    return "" if path[0] == "model" else path[0].removeprefix(_OneInput.PREFIX)


def _export(model: nn.Module, x: Tensor) -> Trace:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # export warns about its own internals
            program = export(_OneInput(model), (x,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
            program = program.run_decompositions({})
    except Exception as error:
        raise ValueError(
            f"expected a model that torch.export can trace, but exporting {type(model).__name__} on an input of "
            f"shape {tuple(x.shape)} failed: {error}"
        ) from error
    return Trace(program, _first_names(model))


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first it goes by, which is the one the model's modules list."""
    tensors = named_tensors(model)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in tensors.items()}


def _is_symbolic(size: int | torch.SymInt) -> bool:
    """Whether a size depends on the batch; export keeps some constants as symbolic integers too."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


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
