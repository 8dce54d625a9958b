"""Foldings, and what holds for every one of them."""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from wiring import Wired

import singe

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norms(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def settled(model, seed=4):
    """Batch norms of every rank with statistics away from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    for norm in norms(model).values():
        if norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        if norm.weight is not None:
            norm.weight.data.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
        if norm.bias is not None:
            norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator))
    return model.eval()


def error(actual, expected):
    """The largest of all outputs."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    return max(float((a - e).detach().double().norm() / e.detach().double().norm()) for a, e in pairs)


def folded(model, x, **options):
    """The folding, after a look at what holds for every one of them."""
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        folding = singe.fold_batchnorm(model, x, **options)
        actual = copy.deepcopy(folding.model).eval()(x)
    assert type(folding.model) is type(model)
    assert sorted([*folding.folded, *folding.unfolded]) == sorted(norms(model))
    assert set(norms(folding.model)) == set(folding.unfolded)
    assert all(
        type(folding.model.get_submodule(n)) is nn.Identity for n in folding.folded if type(norms(model)[n]) in PLAIN
    )
    assert error(actual, expected) < {torch.float64: 1e-12, torch.float32: 1e-4}.get(x.dtype, 3e-2)
    return folding


def conv(inputs, outputs, size=1, **options):
    return nn.Conv2d(inputs, outputs, size, **options)


def norm(width=4, **options):
    return nn.BatchNorm2d(width, **options)


def double(wiring, **modules):
    return settled(Wired(wiring, **modules)).double()
