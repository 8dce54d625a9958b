"""The demo: a small ResNet learns scikit-learn's handwritten digits, is pruned, saved and loaded."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from .prune import prune
from .sizes import count_macs, count_parameters
from .storage.saved import load
from .table import table
from .timing.latency import latencies
from .training.accuracy import accuracy

Say = Callable[[str], None]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, 1x1 where the shape changes (He et al. 2016, option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class DigitNet(nn.Module):
    """A ResNet of three stages for 8x8 images in ten classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 8, 8] -> logits [B, 10]."""
        y = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(y.mean((2, 3)))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,437 training and 360 test images, standardised; needs scikit-learn.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the demo's images come with scikit-learn: pip install 'singe[demo]'") from error
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    x = (x - x.mean()) / x.std()
    y = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def train(model: nn.Module, loader: DataLoader, epochs: int) -> nn.Module:
    """Trains in place with SGD on a one-cycle schedule and returns the model in eval mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs=epochs, steps_per_epoch=len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def run(say: Say, rhos: tuple[float, ...] = (0.5, 0.8), epochs: int = 12) -> None:
    """Trains, prunes to each share of ``rhos``, compares, saves, loads, and checks that nothing changed."""
    torch.manual_seed(0)
    training, test = digits()
    loader = DataLoader(training, batch_size=64, shuffle=True)
    start = time.perf_counter()
    model = train(DigitNet(), loader, epochs)
    say(f"Trained a ResNet on {len(training):,} handwritten digits in {time.perf_counter() - start:.0f} s.")

    pruned = []
    for rho in rhos:
        start = time.perf_counter()
        result = prune(model, loader, rho)
        say(f"Removed {result.params_removed:.1%} of its parameters in {time.perf_counter() - start:.0f} s.")
        pruned.append(result)

    models = [model, *(r.model for r in pruned)]
    images, labels = test.tensors
    seconds = [found.median for found in latencies(models, images)]
    rows = []
    for name, net, s in zip(["unpruned", *(f"rho = {rho:g}" for rho in rhos)], models, seconds, strict=True):
        correct, macs = accuracy(net, [(images, labels)]), count_macs(net, images[:1])
        rows.append([name, f"{correct:.1%}", f"{count_parameters(net):,}", f"{macs:,}", f"{s * 1e3:.1f} ms"])
    say(
        "\n"
        + table(["network", "test accuracy", "parameters", "multiply-adds", f"latency, batch of {len(images)}"], rows)
    )

    with tempfile.TemporaryDirectory() as directory:
        pruned[-1].save(directory)
        size = (Path(directory) / "model.safetensors").stat().st_size
        again = load(DigitNet(), directory).eval()
        with torch.no_grad():
            same = torch.equal(again(images), pruned[-1].model(images))
    if not same:
        raise RuntimeError("the loaded network does not answer as the saved one")
    say(f"\nSaved the smallest ({size:,} bytes of weights), loaded it into a fresh network: the same answers.")
