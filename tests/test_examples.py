"""Every script in examples/ runs, on less than it is meant for."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import singe

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
LEAST = {
    "custom_loop": {"width": 4, "epochs": 1},
    "custom_loss": {"count": 32, "size": 16, "width": 4, "epochs": 1, "steps": 4},
    "detector": {"count": 32, "size": 32, "width": 4, "epochs": 1, "steps": 4},
    "export_onnx": {"width": 4, "epochs": 1, "steps": 4},
    "gradual": {"width": 4, "epochs": 3, "every": 1, "per_round": 6, "until": 2},
    "timm_model": {"name": "test_vit.r160_in1k", "count": 8, "batch": 4, "rho": 0.1, "steps": 2, "images": 4},
    "torchvision_model": {
        "name": "shufflenet_v2_x0_5", "size": 32, "count": 8, "batch": 4, "rho": 0.1, "steps": 2, "images": 4,
    },
}  # fmt: skip


@pytest.fixture(params=SCRIPTS)
def script(request, monkeypatch):
    """The name of an example and its main function; skipped where a library that it is about is not installed."""
    name = request.param
    if name.endswith("_model"):
        pytest.importorskip(name.removesuffix("_model"))
    spec = importlib.util.spec_from_file_location(f"examples.{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return name, module.main


def accuracy_of_file(path):
    """One image after the other, where the script runs all at once."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    x, y = singe.demo.digits()[1].tensors
    answers = [int(session.run(None, {"input": image[None].numpy()})[0].argmax()) for image in x]
    return (torch.tensor(answers) == y).double().mean().item()


def test_an_example_runs_and_prunes(script, tmp_path, monkeypatch):
    name, main = script
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        done = main(**LEAST[name])
    if name == "export_onnx":
        assert done == pytest.approx(accuracy_of_file(tmp_path / "digits.onnx"))
    elif name == "custom_loop":
        counts = [sum(p.numel() for p in model.parameters()) for model in done]
        assert counts[0] == counts[1] < 0.6 * sum(p.numel() for p in singe.demo.DigitNet(4).parameters())
    else:
        assert 0.05 < done.params_removed < 0.7


def test_every_example_is_listed():
    listed = (FOLDER / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in SCRIPTS)
    assert set(LEAST) == set(SCRIPTS)
