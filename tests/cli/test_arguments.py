import argparse
import inspect
import sys

import pytest

import singe
from singe import FineTune
from singe.cli.arguments import allocation, finetune, prune_arguments
from singe.cli.parser import build


def said(*words):
    parser, _ = build()
    return parser.parse_args(["prune", "--model", "nets:tiny", "--data", "nets:some", "--rho", "0.5", *words])


def test_only_what_was_said_is_passed_on():
    assert prune_arguments(said()) == {}
    assert prune_arguments(said("--round-to", "8", "--no-structured")) == {"round_to": 8, "structured": False}


def test_every_argument_of_prune_can_be_said(place):
    words = {
        "target": ["macs"], "allocation": ["fc=0"], "round_to": ["8"], "max_rate": ["0.9"], "images": ["32"],
        "criterion": ["magnitude"], "refresh": ["full"], "precision": ["bfloat16"], "memory": ["512MiB"], "seed": ["3"],
        "analysis_seconds": ["9.5"], "finetune": ["steps=10", "lr=1e-3"], "compensate": ["mean"],
        "compensation_images": ["64"], "recalibrate_bn": ["256"], "loss": ["nets:squares"], "forward": ["nets:call"],
        "ignore": ["a", "b.*"], "latency_batch": ["8"], "checkpoint": ["run"], "evaluate": ["nets:number"],
    }  # fmt: skip
    line = [word for name, value in words.items() for word in ("--" + name.replace("_", "-"), *value)]
    found = prune_arguments(said("--structured", "--no-progress", *line))
    known = set(inspect.signature(singe.prune).parameters) - {"model", "loader", "rho", "callbacks"}
    assert found.keys() == known
    nets = sys.modules["nets"]
    assert found["finetune"] == FineTune(steps=10, lr=1e-3) and found["allocation"] == {"fc": 0}
    assert found["loss"] is nets.squares and found["forward"] is nets.call
    assert found["ignore"] == ["a", "b.*"] and found["memory"] == 512 << 20


def test_a_criterion_is_a_name_or_an_object_of_ones_own(place):
    (place / "mine.py").write_text("import singe\ncriterion = singe.Magnitude(p=1)")
    assert prune_arguments(said("--criterion", "gradient"))["criterion"] == "gradient"
    assert prune_arguments(said("--criterion", "mine:criterion"))["criterion"] == singe.Magnitude(p=1)
    assert prune_arguments(said("--criterion", "singe:Magnitude(p=1)"))["criterion"] == singe.Magnitude(p=1)


def test_allocations():
    assert allocation(["global"]) == "global"
    assert allocation(["layer4.*=2", "stem=0", "fc=0.5"]) == {"layer4.*": 2, "stem": 0, "fc": 0.5}


def test_fine_tuning():
    assert finetune(["none"]) is None
    assert finetune(["steps=5", "when=after", "distill=none"]) == FineTune(steps=5, when="after", distill=None)


@pytest.mark.parametrize(
    "make, words, message",
    [
        (finetune, ["none", "steps=3"], "expected NAME=VALUE words for finetune, each name once, got 'none'"),
        (finetune, ["steps=3", "steps=4"], "each name once"),
        (finetune, ["epochs=3"], "expected steps, when, .* in finetune, got epochs"),
        (finetune, ["steps=many"], "steps"),
        (finetune, ["steps=0"], "steps >= 1, got 0"),
        (allocation, ["uniform", "fc=0"], "expected NAME=VALUE words for allocation"),
    ],
)
def test_what_cannot_be_is_refused(make, words, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(words)


@pytest.mark.parametrize("text, value", [("1", 1), ("3KiB", 3072), ("2 MiB", 2 << 20), ("1GiB", 1 << 30)])
def test_memory_in_units(text, value):
    assert said("--memory", text).memory == value


@pytest.mark.parametrize(
    "words, message",
    [
        (["--memory", "1.5GB"], "expected bytes such as 1073741824, 512MiB or 1GiB, got '1.5GB'"),
        (["--batch-size", "0"], "expected at least 1, got 0"),
        (["--rho", "half"], "invalid float value: 'half'"),
        (["--precision", "float16"], "invalid choice: 'float16'"),
        (["--roundto", "8"], "unrecognized arguments: --roundto 8"),
    ],
)
def test_what_is_no_value_is_refused_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        said(*words)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("singe") and message in line and "--help" in line


@pytest.mark.parametrize("text", ["", "3x32", "1,0,3", "1,,2"])
def test_what_is_no_shape_is_refused(text, capsys):
    parser, _ = build()
    with pytest.raises(SystemExit):
        parser.parse_args(["inspect", "--model", "nets:tiny", "--example", text])
    assert "expected sizes such as 1,3,32,32" in capsys.readouterr().err
    options = parser.parse_args(["inspect", "--model", "nets:tiny", "--example", "2,3"])
    assert isinstance(options, argparse.Namespace) and options.example == (2, 3)


@pytest.mark.parametrize("command", ["prune", "inspect", "report", "export", "demo", "info"])
def test_every_command_has_help_with_examples_and_exit_codes(command, capsys):
    parser, _ = build()
    with pytest.raises(SystemExit) as caught:
        parser.parse_args([command, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert f"\n  singe {command}" in said and "exit codes: 0 done; 1" in said
