import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import singe
from singe import cli
from singe.cli import commands, models
from singe.cli.datasets import Settings, load
from singe.runs.group import Turn
from singe.training.accuracy import accuracy

QUICK = ["--images", "8", "--finetune", "steps=2"]


@pytest.fixture
def run(place, capsys):
    """Runs a command in the directory; its exit code, stdout and stderr."""

    def run(*words):
        code = cli.main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# -- prune -----------------------------------------------------------------------------------------------------


def test_prune_says_and_saves_what_has_become_of_the_network(run, cifar, place):
    save_file(models.make("nets:tiny").state_dict(), "tiny.safetensors")
    (place / "prune.toml").write_text(
        'model = "nets:tiny"\nweights = "tiny.safetensors"\ndata = "cifar10:cifar"\nrho = 0.5\nbatch_size = 32\n'
        'finetune = { steps = 2 }\nimages = 8\n'
    )  # fmt: skip
    code, out, err = run("prune", "--config", "prune.toml", "--rho", "0.3", "--out", "pruned", "--test-images", "30")
    assert code == 0 and "warning" not in err
    assert re.search(r"^singe: group 1 of \d: layers\.\d \d -> \d; loss [\d.]+, evaluation ", err, re.MULTILINE)
    assert "singe: fine-tuning: 2 of 2 steps, loss " in err

    unpruned = models.make("nets:tiny")
    models.fill(unpruned, place / "tiny.safetensors")
    pruned, test = (
        singe.load(unpruned, "pruned"),
        load("cifar10:cifar", Settings(batch_size=32), torch.device("cpu")).test,
    )
    test = [(x[:30], y[:30]) for x, y in test]
    assert 0.2 < 1 - singe.sizes.count_parameters(pruned) / singe.sizes.count_parameters(unpruned) < 0.4
    before, after = accuracy(unpruned, test), accuracy(pruned, test)
    (said,) = [line for line in out.splitlines() if line.startswith("evaluation")]
    assert said.split() == ["evaluation", f"{before:.4g}", f"{after:.4g}"]
    assert "\nparameters" in out and "left whole: layers.6 (network output)" in out and "saved in pruned" in out
    facts = json.loads((place / "pruned" / "report.json").read_text())
    assert facts["evaluation"] == pytest.approx([before, after])

    # the same once more, as the file beside the result says it
    code, again, err = run("prune", "--config", "pruned/run.toml", "--out", "again", "--no-progress")
    assert (code, err) == (0, "") and said.split() in [line.split() for line in again.splitlines()]
    assert (place / "again" / "plan.json").read_bytes() == (place / "pruned" / "plan.json").read_bytes()
    assert (place / "again" / "run.toml").read_bytes() == (place / "pruned" / "run.toml").read_bytes()


def test_a_dry_run_says_what_would_go_and_leaves_nothing(run, place):
    words = ["--model", "nets:tiny", "--data", "nets:some", "--rho", "0.3", "--dry-run", "--out", "pruned", *QUICK]
    code, out, err = run("prune", *words)
    assert (code, err) == (0, "")
    assert "layers.0" in out and "would take about" in out and "fine-tuning" in out
    assert not (place / "pruned").exists()


def test_single_weights(run, place):
    words = [
        "--model",
        "nets:tiny",
        "--data",
        "nets:fixed",
        "--rho",
        "0.5",
        "--no-structured",
        "--out",
        "pruned",
        *QUICK,
    ]
    code, out, err = run("prune", *words)
    assert code == 0 and out.splitlines()[2].startswith("weights") and "-50.0%" in out
    assert (place / "pruned" / "masks.safetensors").exists()
    warning, *rest = err.splitlines()
    assert warning.startswith("singe: warning: the loader does not shuffle: all that is measured and refitted is so on")
    assert any(line.startswith("singe: layer 1 of 3: layers.0.weight without ") for line in rest)


def test_an_interrupted_run_goes_on_from_its_checkpoint(run, place, monkeypatch):
    models.make("nets:tiny")  # importing the module draws at random: in a process of its own every run does so once
    words = ["prune", "--model", "nets:tiny", "--data", "nets:split", "--rho", "0.3", *QUICK, "--checkpoint", "run"]
    assert run(*words, "--out", "whole")[0] == 0
    (place / "run" / "checkpoint.safetensors").unlink()
    take, done = Turn.take, []

    def first_only(self):
        if done:
            raise KeyboardInterrupt
        done.append(self)
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(Turn, "take", first_only)
        code, out, err = run(*words, "--out", "pruned")
    assert (code, out) == (130, "") and err.endswith("singe: interrupted; the same command resumes from run\n")
    assert run(*words, "--out", "pruned")[0] == 0
    for name in ("plan.json", "model.safetensors"):
        assert (place / "pruned" / name).read_bytes() == (place / "whole" / name).read_bytes()


class Board(list):
    """What ``singe.TensorBoard`` is told."""

    def __init__(self, logdir):
        super().__init__()
        boards[str(logdir)] = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.append("closed")

    def __call__(self, record):
        self.append(record.evaluation)


boards = {}


def test_ones_own_loss_forward_evaluation_and_board(run, place, monkeypatch):
    monkeypatch.setattr(commands, "TensorBoard", Board)
    words = ["prune", "--model", "nets:tiny", "--data", "nets:split", "--rho", "0.3", "--out", "pruned", *QUICK]
    own = ["--forward", "nets:call", "--loss", "nets:squares"]
    code, out, err = run(*words, *own)
    assert (code, out) == (2, "") and "expected --evaluate REF beside --forward" in err
    (place / "judge.py").write_text("def width(model): return model.layers[0].out_channels / 3")
    code, out, err = run(*words, *own, "--evaluate", "judge:width", "--tensorboard", "logs")
    (said,) = [line.split() for line in out.splitlines() if line.startswith("evaluation")]
    assert code == 0 and said == ["evaluation", "1.333", "1"]
    assert boards["logs"] == [1, 1, "closed"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rho", "1.5"], "expected rho in (0, 1), got 1.5"),
        (["--model", "nets:large"], "expected 'large' in nets"),
        (["--weights", "none.pt"], "found none at none.pt"),
        (["--data", "cifar10:nowhere"], "data_batch_1.bin is missing"),
        (["--data", "nets:nothing"], "expected a loader with at least one batch"),
        (["--device", "tpu"], "expected an available device, got 'tpu'"),
        (["--criterion", "guess"], "guess"),
        (["--allocation", "conv9=0"], "conv9"),
        (["--loss", "nets:constant"], "expected a loss that depends smoothly"),
        (["--round-to", "0"], "round_to >= 1, got 0"),
        (["--out", "nets.py"], "nets.py"),
        (["--ignore", "nowhere*"], "nowhere*"),
        (["--data", "cifar10:cifar", "--model", "torch.nn:Identity"], "no parameters"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(run, cifar, place, words, message):
    code, out, err = run("prune", "--model", "nets:tiny", "--data", "nets:split", "--rho", "0.3", "--out", "x", *words)
    assert code == 2 and out == ""
    line = err.splitlines()[-1]
    assert line.startswith("singe: error: ") and message in line
    assert all(other.startswith("singe: ") and "error" not in other for other in err.splitlines()[:-1])
    assert not (place / "x").exists(), "a call that is refused leaves no directory"


def test_out_is_needed(run, place):
    code, _, err = run("prune", "--model", "nets:tiny", "--data", "nets:some", "--rho", "0.3")
    assert code == 2 and err == "singe: error: expected --out DIR for the result, or --dry-run, got neither\n"


def test_a_run_that_fails_is_no_bad_input(run, place):
    words = ["--model", "nets:tiny", "--data", "nets:split", "--rho", "0.3", "--out", "pruned", "--images", "8"]
    code, out, err = run("prune", *words, "--finetune", "steps=40", "lr=1e30")
    assert (code, out) == (1, "") and "smaller lr" in err
    assert not (place / "pruned" / "plan.json").exists()


# -- the others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [["--example", "2,3,32,32"], ["--data", "nets:some"]])
def test_inspect_prints_what_can_be_pruned(run, place, inputs):
    code, out, err = run("inspect", "--model", "nets:tiny", *inputs, "--ignore", "layers.2")
    assert (code, err) == (0, "")
    expected = singe.inspect(models.make("nets:tiny"), torch.zeros(2, 3, 32, 32), ignore=["layers.2"])
    assert out == f"{expected}\n"


def test_inspect_needs_inputs_that_fit(run, place):
    code, _, err = run("inspect", "--model", "nets:tiny")
    assert code == 2 and "expected --example SHAPE or --data REF" in err
    code, _, err = run("inspect", "--model", "nets:tiny", "--example", "2,1,32,32")
    assert code == 2 and "expected batches that fit Tiny" in err


@pytest.fixture
def pruned(place):
    torch.manual_seed(0)
    model = models.make("nets:tiny")
    result = singe.prune(model, sys.modules["nets"].some, 0.3, images=8, finetune=None, progress=False)
    result.save(place / "pruned")
    return result


def test_export_writes_the_pruned_network(run, place, pruned):
    onnxruntime = pytest.importorskip("onnxruntime")
    words = ["--onnx", "out/tiny.onnx", "--model", "nets:tiny", "--example", "2,3,32,32"]
    code, out, err = run("export", "pruned", *words)
    assert (code, out, err) == (0, "out/tiny.onnx\n", "")
    x = torch.randn(3, 3, 32, 32)
    (found,) = onnxruntime.InferenceSession("out/tiny.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pruned.model.eval()(x).detach(), rtol=1e-3, atol=1e-4)


def test_export_refuses_another_model_and_what_is_no_result(run, place, pruned):
    words = ["--onnx", "tiny.onnx", "--example", "2,3,32,32"]
    code, _, err = run("export", "pruned", "--model", "nets:Tiny(9)", *words)
    assert code == 2 and err.startswith("singe: error: ")
    code, _, err = run("export", "nowhere", "--model", "nets:tiny", *words)
    assert code == 2 and "nowhere" in err
    assert not (place / "tiny.onnx").exists()


def test_report_writes_the_page(run, place, monkeypatch):
    monkeypatch.setattr(commands, "write_report", lambda directory, out: (out or directory) / "report.html")
    assert run("report", "pruned") == (0, "pruned/report.html\n", "")
    assert run("report", "pruned", "--out", "page") == (0, "page/report.html\n", "")


def test_torchrun_divides_the_work_and_the_first_process_saves_it(run, place):
    words = ["prune", "--model", "nets:tiny", "--data", "nets:batches", "--rho", "0.3", *QUICK, "--out"]
    assert run(*words, "one")[0] == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    program = [sys.executable, "-c", "import sys; from singe.cli import main; sys.exit(main())"]
    done = subprocess.run([*launcher, *program, *words, "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in two") == 1
    assert (place / "two" / "plan.json").read_bytes() == (place / "one" / "plan.json").read_bytes()
