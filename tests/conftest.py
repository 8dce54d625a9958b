from __future__ import annotations

import functools
import gc
import sys
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch._C import DispatchKey
from torch.export import exported_program
from torch.utils.data import DataLoader, TensorDataset

from singe import demo
from singe.graph import export
from singe.graph.trace import named_tensors, plain_call
from singe.models.batches import described
from singe.timing.latency import Latency

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# what imports made, and the graphs of networks, are looked through again and again otherwise: a tenth of all time
gc.freeze()
gc.set_threshold(100_000, 50, 100)

# each export prepares some 500 operators for every backend that torch knows: a fifth of an export of a small network
for keys in ("_AUTOGRAD_ALIAS_BACKEND_KEYS_TO_OVERRIDE", "_BACKEND_KEYS_TO_OVERRIDE"):
    backends: list[DispatchKey] = getattr(exported_program, keys, [])
    backends[:] = [key for key in backends if key.name.endswith(("CPU", "CUDA", "Meta"))]
# and looks for these operators among all there are: an eighth
if hasattr(exported_program, "_collect_all_valid_cia_ops"):
    exported_program._collect_all_valid_cia_ops = functools.cache(exported_program._collect_all_valid_cia_ops)


@pytest.fixture(scope="session")
def digit_data() -> tuple[TensorDataset, TensorDataset]:
    return demo.digits()


@pytest.fixture(scope="session")
def trained(digit_data: tuple[TensorDataset, TensorDataset]) -> nn.Module:
    """The demo network, trained to over 95 % on the digits; shared by all tests, so never to be modified."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return demo.train(demo.DigitNet(), DataLoader(digit_data[0], batch_size=64, shuffle=True), epochs=6)


@pytest.fixture(scope="session")
def digit_batch(digit_data: tuple[TensorDataset, TensorDataset]) -> tuple[Tensor, Tensor]:
    x, y = digit_data[0].tensors
    return x[:64], y[:64]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Networks take a microsecond for each parameter, whatever the machine; how many were measured, call by call."""
    calls = []

    def seconds(module):
        return 1e-6 * sum(p.numel() for p in module.parameters(recurse=False))

    def latencies(models, example, forward, rounds=1):
        calls.append(len(models))
        totals = [sum(map(seconds, model.modules())) for model in models]
        return [Latency(total, total, total, rounds) for total in totals]

    def module_times(models, batch, task, rounds):
        return [{name: seconds(module) for name, module in model.named_modules()} for model in models]

    monkeypatch.setattr(sys.modules["singe.allocation.latency_budget"], "latencies", latencies)
    monkeypatch.setattr(sys.modules["singe.result"], "latencies", latencies)
    monkeypatch.setattr(sys.modules["singe.allocation.latency_budget"], "module_times", module_times)
    return calls


_PROGRAMS: dict[Any, Any] = {}


@pytest.fixture(autouse=True)
def exports_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports each of the small networks once for all tests: nothing writes to an export, and traces are made anew."""
    original = export.exported

    def exported(model, inputs, forward):
        known = type(model).__module__ in ("networks", "small_resnet", "singe.demo") and forward is plain_call
        if not known or torch.get_default_dtype() != torch.float32 or torch.is_autocast_enabled("cpu"):
            return original(model, inputs, forward)
        modules, tensors = list(model.named_modules(remove_duplicate=False)), named_tensors(model)
        simple = (bool, int, float, str, tuple, torch.dtype)
        own = [(n, k, v) for n, m in modules for k, v in vars(m).items() if isinstance(v, simple)]
        first = list(dict.fromkeys(map(id, tensors.values())))
        named = [
            (n, first.index(id(t)), t.shape, t.dtype, t.stride(), t.requires_grad, t.device) for n, t in tensors.items()
        ]
        key = repr((type(model), repr(model), own, named, described(inputs), torch.is_inference_mode_enabled()))
        if key in _PROGRAMS:
            return _PROGRAMS[key]
        program, form = original(model, inputs, forward)
        if not program.graph_signature.inputs_to_lifted_tensor_constants:
            _PROGRAMS[key] = program, form
        return program, form

    monkeypatch.setattr(sys.modules["singe.graph.trace"], "exported", exported)


@pytest.fixture
def one_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports each kind of network once a test: the graph of one copy is run with the live parameters of another.

    Once its batch norms are folded it may have more parameters, and is of another kind.
    """
    kept, original = {}, sys.modules["singe.graph.trace"].trace

    def trace(model, inputs, forward):
        key = type(model), tuple(model.state_dict()), described(inputs), forward
        if key not in kept:
            kept[key] = original(model, inputs, forward)
        return kept[key]

    for module in ("singe.score", "singe.reference"):
        monkeypatch.setattr(sys.modules[module], "trace", trace)
