"""What modules keep of their widths, beside their tensors."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

_MOST_AXES = 8
"""Longer sequences of integers are no shapes."""


def integers(module: nn.Module) -> dict[str, int]:
    """Every integer attribute of a module, and as ``name[i]`` those in tuples and lists that may be shapes."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if type(value) is int:
            found[name] = value
        elif isinstance(value, (tuple, list)) and len(value) <= _MOST_AXES:
            found |= {f"{name}[{i}]": part for i, part in enumerate(value) if type(part) is int}
    return found


def set_integer(module: nn.Module, name: str, value: int) -> None:
    """Changes what :func:`integers` calls by a name."""
    attribute, _, index = name.removesuffix("]").partition("[")
    if index:
        old = getattr(module, attribute)
        new = [value if i == int(index) else part for i, part in enumerate(old)]
        setattr(module, attribute, old._make(new) if hasattr(old, "_make") else type(old)(new))
    else:
        setattr(module, name, value)


def widths_by_tensors(module: nn.Module) -> dict[str, int]:
    """The attributes of a module that are widths, as its tensors say they should be.

    Not of a module whose weight is computed: looking at it would compute it, which may draw or count.
    """
    if is_parametrized(module):
        return {}
    if isinstance(module, _ConvNd):
        whole, part = module.weight.shape[0], module.weight.shape[1] * module.groups
        if module.transposed:
            return {"in_channels": whole, "out_channels": part}
        return {"in_channels": part, "out_channels": whole}
    if isinstance(module, nn.Linear):
        return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
    if isinstance(module, _NormBase):
        channels = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        return {} if channels is None else {"num_features": len(channels)}
    if isinstance(module, nn.GroupNorm):
        return {} if module.weight is None else {"num_channels": len(module.weight)}
    return {"num_parameters": len(module.weight)} if isinstance(module, nn.PReLU) else {}
