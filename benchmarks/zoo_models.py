"""The models of the zoo: :data:`MODELS`, of torchvision, of timm and our own, none of them trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo_networks import CLASSES, NETWORKS

SAMPLES = 4


@dataclass(frozen=True)
class Entry:
    """A kind of model.

    Attributes:
        make: builds one.
        shapes: of one sample of each input.
        classes: its number of logits; None for models that are not classifiers.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    classes: int | None

    def inputs(self) -> tuple[Tensor, ...]:
        """:data:`SAMPLES` samples of noise, each around its own mean, which pooling does not average away."""
        return tuple(
            torch.randn(SAMPLES, *shape) + torch.randn(SAMPLES, shape[0], *[1] * len(shape[1:]))
            for shape in self.shapes
        )


def _torchvision(name: str, side: int = 64, classes: int | None = 1000, frames: int = 0, **options: Any) -> Entry:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, **options)

    return Entry(make, ((3, *([frames] if frames else []), side, side),), classes)


def _timm(name: str, side: int = 64) -> Entry:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return Entry(make, ((3, side, side),), 1000)


def _own(name: str) -> Entry:
    make, shapes = NETWORKS[name]
    return Entry(make, shapes, None if name in ("unet", "pixel_shuffle", "dict_output") else CLASSES)


# small images do not change dependencies; windows and position embeddings need sizes of their own
_segmentation = partial(_torchvision, side=96, classes=None, weights_backbone=None, aux_loss=True)

_TORCHVISION = {
    **{
        name: _torchvision(name)
        for name in (
            "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "vgg16", "vgg16_bn", "squeezenet1_1",
            "densenet121", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet1_0",
            "shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "convnext_tiny",
        )
    },
    "alexnet": _torchvision("alexnet", side=96),
    "googlenet": _torchvision("googlenet", aux_logits=True, init_weights=False),
    "inception_v3": _torchvision("inception_v3", side=299, aux_logits=True, init_weights=False),
    **{name: _torchvision(name, side=224) for name in ("vit_b_16", "swin_t", "maxvit_t")},
    **{name: _segmentation(name) for name in ("deeplabv3_resnet50", "fcn_resnet50")},
    "r2plus1d_18": _torchvision("r2plus1d_18", frames=8, classes=400),
}  # fmt: skip
_TIMM = {
    **{
        name: _timm(name)
        for name in (
            "convnext_tiny", "efficientnet_b0", "mobilenetv4_conv_small", "res2net50_26w_4s", "ghostnet_100",
            "repvgg_a0", "cspdarknet53", "poolformer_s12",
        )
    },
    "mobilevit_s": _timm("mobilevit_s", side=128),
    "hrnet_w18_small": _timm("hrnet_w18_small", side=96),
    **{
        name: _timm(name, side=224)
        for name in (
            "vit_small_patch16_224", "deit_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s16_224",
        )
    },
}  # fmt: skip

MODELS: dict[str, Entry] = {
    **{f"torchvision/{name}": entry for name, entry in _TORCHVISION.items()},
    **{f"timm/{name}": entry for name, entry in _TIMM.items()},
    **{f"own/{name}": _own(name) for name in NETWORKS},
}


def lively(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model in which every neuron matters, in eval mode, and inputs for it; the same ones for the same name.

    A new network hides mistakes behind branches that are multiplied by zero, layer scales of 1e-6 and batch norms that
    change nothing. Here every constant parameter becomes random, every layer's outputs are scaled to a deviation of one
    (as in Mishkin and Matas 2016), and batch norms get the statistics of their inputs, randomly perturbed.

    Raises:
        RuntimeError: outputs that are not finite, or the same for all samples.
    """
    torch.manual_seed(0)
    entry = MODELS[name]
    model = entry.make()
    inputs = entry.inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            _vary(parameter)
        _fit_scales(model, inputs)
        _shift_statistics(model)
        for output in pytree.tree_leaves(model.eval()(*inputs)):
            if not output.isfinite().all():
                raise RuntimeError(f"expected {name} to put out finite numbers")
            if output.std(0).max() < 1e-3 * output.abs().max():
                raise RuntimeError(f"expected {name} to tell its inputs apart")
    return model, inputs


def _vary(parameter: nn.Parameter) -> None:
    """Random values for a constant parameter: like a weight's, a scale's around one, or else a bias's."""
    if parameter.numel() == 1 or parameter.min() != parameter.max():
        return
    fan_in = parameter[0].numel()
    if fan_in > 1:
        parameter.normal_(std=fan_in**-0.5)
    elif parameter.any():
        parameter.uniform_(0.5, 1.5)
    else:
        parameter.normal_(std=0.3)


def _fit_scales(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Scales each layer once to outputs of deviation one; batch norms take the statistics of their new inputs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    done = set()

    def fit(layer: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        own = [p for name in ("weight", "bias") if (p := layer._parameters.get(name)) is not None]
        if layer in done or "weight" not in layer._parameters:
            return None
        done.add(layer)
        deviation = output.std()
        for parameter in own:
            parameter.div_(deviation)
        return output / deviation

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [m.register_forward_hook(fit) for m in model.modules() if isinstance(m, kinds)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for hook in hooks:
        hook.remove()


def _shift_statistics(model: nn.Module) -> None:
    """Shifts every channel's mean and variance at random; together these keep the size of signals."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            mean, variance = module.running_mean, module.running_var
            mean.add_(0.3 * variance.sqrt() * torch.randn_like(mean))
            variance.mul_(torch.empty_like(variance).uniform_(0.75, 1.5))
