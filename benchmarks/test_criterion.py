"""A criterion on one layer: the engine against the literal autograd reference, at equal mathematics."""

from __future__ import annotations

import pytest
import torch
from models import random_images, resnet56

import singe

LAYERS = ["blocks.1.conv1", "blocks.12.conv1", "blocks.24.conv1"]  # one a stage
CRITERION = singe.IntegratedGradient(quadrature=singe.GaussLegendre(2))
IMAGES = 16


@pytest.fixture(scope="module")
def setting() -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return resnet56(), random_images(IMAGES)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", [singe.score, singe.reference.score], ids=["engine", "reference"])
def test_integrated_gradient(benchmark, setting, way, layer):
    model, batch = setting
    benchmark.group = f"integrated gradient, ResNet-56, {layer}, 2 nodes, {IMAGES} images"
    benchmark.pedantic(way, args=(model, batch, layer), kwargs={"criterion": CRITERION}, rounds=3, warmup_rounds=1)
