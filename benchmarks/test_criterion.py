"""A criterion on one layer: the engine against the literal autograd reference, at equal mathematics.

Both get the exported graph for free: it is the same for all layers and no part of the criterion.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from models import load, random_images

import singe
from singe.graph.analysis import find_groups
from singe.graph.trace import trace

LAYERS = ["blocks.1.conv1", "blocks.12.conv1", "blocks.24.conv1"]  # one a stage
CRITERION = singe.IntegratedGradient(quadrature=singe.GaussLegendre(2))
IMAGES = 16
WAYS: dict[str, ModuleType] = {"engine": sys.modules["singe.score"], "reference": singe.reference}


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    model, batch = load("resnet56"), random_images(IMAGES)
    graph = trace(model, batch[0])
    return model, batch, graph, find_groups(graph)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_integrated_gradient(benchmark, monkeypatch, setting, way, layer):
    model, batch, graph, groups = setting
    monkeypatch.setattr(WAYS[way], "trace", lambda *_: graph)
    monkeypatch.setattr(WAYS[way], "find_groups", lambda *_: groups)
    benchmark.group = f"integrated gradient, ResNet-56, {layer}, 2 nodes, {IMAGES} images"
    score = WAYS[way].score
    benchmark.pedantic(score, (model, batch, layer), {"criterion": CRITERION}, rounds=3, warmup_rounds=1)
