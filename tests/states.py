"""What a run must leave as it was: a model's state, every random generator, torch's global settings."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything of a model that a user can see change."""
    return (
        copy.deepcopy(model.state_dict()),
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def random_states(*generators: torch.Generator) -> tuple[Any, ...]:
    """The states of torch's, numpy's and Python's generators, and of some more."""
    numpy_state = np.random.get_state()
    own = [g.get_state() for g in generators]
    return torch.get_rng_state(), numpy_state[1].copy(), numpy_state[2], random.getstate(), own


def global_settings() -> dict[str, Any]:
    """Torch's settings that hold for the whole process or thread."""
    cudnn = torch.backends.cudnn
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled()),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "anomalies": torch.is_anomaly_enabled(),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors and arrays to the bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(u, v) for u, v in zip(a, b, strict=True))
    return a == b
