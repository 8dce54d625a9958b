"""What tests of whole runs share: data, quick settings, snapshots of a model."""

import random

import numpy as np
import torch
from networks import MLP, randomised
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.models.weightnorm import plain_copy
from singe.removal.surgery import zero

CRITERIA = ["magnitude", "gradient", "magnitude_gradient", "summed_gradient", "integrated_gradient", "loss_change"]


def vectors(count=40, **options):
    """A shuffling loader over vectors in four clusters."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(count) % 4
    x = torch.randn(4, 10, generator=generator)[y] * 2 + torch.randn(count, 10, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, **options)


def prune(model, loader=None, rho=0.3, **options):
    """``singe.prune``, small, quiet and plain."""
    plain = {"allocation": "uniform", "compensate": "none", "finetune": None, "images": 20, "progress": False}
    options = {**plain, **options}
    return singe.prune(model, vectors() if loader is None else loader, rho, **options)


def masked(model, plan):
    """A copy in eval mode in which all that a plan removed is zero."""
    network = plain_copy(model).eval()
    zero(network, plan.removed())
    return network


def mlp(seed=0):
    return randomised(MLP(), seed)


def learned(model, steps=60):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    x, y = vectors().dataset.tensors
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def random_states(generator):
    numpy_state = np.random.get_state()
    return (
        torch.get_rng_state().tolist(), numpy_state[1].tolist(), numpy_state[2], random.getstate(),
        generator.get_state().tolist(),
    )  # fmt: skip


def snapshot(model):
    return (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def same_plan(a, b):
    return [(r.group, r.neurons) for r in a.plan.removals] == [(r.group, r.neurons) for r in b.plan.removals]
