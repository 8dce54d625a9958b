"""The code in docs/ecosystem.md runs, on stand-ins for what a reader has."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import DigitNet, images, randomised
from test_forward import TextClassifier, encoded
from torch import nn
from torch.nn import functional as F

import singe

PAGE = (Path(__file__).parents[1] / "docs" / "ecosystem.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


class Lit(nn.Module):
    """What pruning sees of a LightningModule."""

    def __init__(self):
        super().__init__()
        self.net = randomised(DigitNet(4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y)


@pytest.fixture(scope="module")
def names():
    """What the page takes for given, by name."""
    x, y = images(8, channels=1, classes=10)
    lit, model = Lit(), randomised(DigitNet(4))
    loader = [(x, y)] * 2
    prune, quick = singe.prune, {"images": 8, "finetune": singe.FineTune(steps=2), "progress": False}
    return {
        "torch": torch,
        "singe": SimpleNamespace(
            **{name: getattr(singe, name) for name in singe.__all__}
            | {"prune": lambda *args, **options: prune(*args, **options, **quick)}
        ),
        "x": x, "y": y, "model": model, "lit": lit,
        "result": prune(model, loader, 0.3, **quick),
        "data": SimpleNamespace(train_dataloader=lambda: loader),
        "trainer": SimpleNamespace(fit=lambda model, data: model.train()),
        "L": SimpleNamespace(Callback=object),
    }  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_code_runs(block, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "input_ids" in block:
        names = names | {"model": randomised(TextClassifier()), "loader": [encoded(8)] * 2}
    exec(block, dict(names))
