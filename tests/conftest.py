from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from singe import demo

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


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
