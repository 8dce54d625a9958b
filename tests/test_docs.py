"""What the documents say holds: their code runs, page by page, and the messages they quote are there."""

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import PlainNet, images
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.report.facts import Facts
from singe.storage.progress import NeuronProgress
from singe.training.finetune import Tuner

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"ecosystem.md"}  # test_ecosystem_page.py has the stand-ins for what other libraries give
WITH_CODE = [page for page in PAGES if "```python" in page.read_text() and page.name not in ELSEWHERE]


def blocks(page):
    """(line, code) of every block of Python."""
    text = page.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start()].count("\n") + 2, match[1]


def train_one_epoch(model, loader, optimizer):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def reader(folder):
    """What a reader of any page has at hand: a trained network, data, a training loop."""
    torch.manual_seed(0)
    x, y = images(48, classes=4)
    model = PlainNet().eval()
    return {
        "singe": singe, "torch": torch, "nn": nn, "make_model": PlainNet, "model": model, "x": x, "y": y,
        "loader": DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True), "layer": "features.0",
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01), "train_one_epoch": train_one_epoch,
        "path": folder / "state.pt", "test_loader": [(x, y)],
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capsys, measured, few_steps, launched):
    monkeypatch.chdir(tmp_path)
    names = reader(tmp_path)
    for line, code in blocks(page):
        tree = ast.parse(code, filename=page.name)
        ast.increment_lineno(tree, line - 1)
        exec(compile(tree, str(page), "exec"), names)


@pytest.fixture
def few_steps(monkeypatch):
    """Fine-tuning takes a handful of steps, whatever a page says."""
    init = Tuner.__init__

    def short(self, plan, *arguments, **options):
        init(self, replace(plan, steps=min(plan.steps, 5)), *arguments, **options)

    monkeypatch.setattr(Tuner, "__init__", short)


@pytest.fixture
def launched(monkeypatch):
    """What torchrun tells a process that is the only one."""
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


SOURCE = "".join(path.read_text() for path in sorted((ROOT / "singe").rglob("*.py")))
PIECES = [re.sub(r"\{[^{}]*\}|%[sd]|%\.?\d*[fg]", "…", "".join(re.findall(r'f?"([^"\n]*)"', line))) for line in
          re.sub(r'"\s*\n\s*f?"', "", SOURCE).split("\n")]  # fmt: skip
QUOTED = re.findall(r"^\| `([^`]+)`", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_are_there(message):
    parts = [part.strip(" ;:,") for part in message.split("...")]
    pattern = ".*".join(re.escape(part) for part in parts)
    assert any(re.search(pattern, piece) for piece in PIECES)


@pytest.mark.parametrize(("kind", "title"), [(Facts, "The report of a run"), (NeuronProgress, "A run in progress")])
def test_the_page_on_formats_lists_every_field(kind, title):
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "format.md").read_text(), re.M | re.S)
    named = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)}
    assert {field.name for field in fields(kind)} <= named


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
