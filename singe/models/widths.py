"""What torch's own modules keep of their widths, beside their tensors."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized


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
