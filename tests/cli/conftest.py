import sys
import textwrap

import pytest
from records import write_records

CODE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=4), nn.ReLU(), nn.Conv2d(width, 6, 3, stride=4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
        )

    def forward(self, x):
        return self.layers(x)

def tiny():
    return Tiny()

def broken():
    raise RuntimeError("no such\\nlayer")

def number():
    return 3

shared = Tiny(5)

class Batches:
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)

def batches(count=3, batch_size=8):
    generator = torch.Generator().manual_seed(0)
    make = lambda: (torch.randn(batch_size, 3, 32, 32, generator=generator), torch.arange(batch_size) % 10)
    return Batches([make() for _ in range(count)])

def split(batch_size=8):
    return batches(3, batch_size), batches(1, batch_size)

def squares(outputs, batch):
    return (outputs ** 2).mean()

def constant(outputs, batch):
    return outputs.detach().mean()

def call(model, batch):
    return model(batch[0])

some = batches()
fixed = list(some)
nothing = Batches([])
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty directory to be in, with a module ``nets`` in it that nobody has imported."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(CODE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    sys.modules.pop("nets", None)
    yield tmp_path
    sys.modules.pop("nets", None)


@pytest.fixture
def cifar(place):
    """CIFAR-10's files, in ``cifar/`` there."""
    (place / "cifar").mkdir()
    return write_records(place / "cifar")
