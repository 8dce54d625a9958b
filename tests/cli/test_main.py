import logging
import os
import subprocess
import sys

import pytest

from singe import cli, demo, info
from singe.cli import commands


@pytest.fixture
def command(monkeypatch):
    """Lets ``singe info`` do something else."""

    def replace(action):
        monkeypatch.setitem(commands.RUN, "info", action)

    return replace


def raising(error):
    def action(options):
        raise error

    return action


@pytest.mark.parametrize(
    "error, code, line",
    [
        (ValueError("expected rho in (0, 1), got 2"), 2, "singe: error: expected rho in (0, 1), got 2"),
        (TypeError("expected\n  an int"), 2, "singe: error: expected an int"),
        (ImportError("pip install 'singe[vision]'"), 2, "singe: error: pip install 'singe[vision]'"),
        (FileNotFoundError("no file"), 2, "singe: error: no file"),
        (OSError(28, "No space left on device"), 1, "singe: error: [Errno 28] No space left on device"),
        (TimeoutError("took too long"), 1, "singe: error: took too long"),
        (RuntimeError("CUDA error"), 1, "singe: error: RuntimeError: CUDA error"),
        (AssertionError(), 1, "singe: error: AssertionError"),
        (KeyboardInterrupt(), 130, "singe: interrupted"),
    ],
)  # fmt: skip
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code, line):
    command(raising(error))
    assert cli.main(["info"]) == code
    captured = capsys.readouterr()
    assert captured.err == f"{line}\n" and captured.out == ""


def test_the_traceback_is_shown_on_request(command, capsys):
    command(raising(ValueError("wrong")))
    assert cli.main(["info", "--traceback"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("singe: error: wrong\n")


def test_what_fails_within_a_run_is_no_bad_input(command, capsys, monkeypatch):
    from singe.runs.neurons import NeuronRun

    def failing(options):
        NeuronRun.execute(None)  # fails at once, inside

    command(failing)
    monkeypatch.setattr(sys.modules["singe.cli"], "_OF_INPUT", (Exception,))
    assert cli.main(["info"]) == 1


def test_warnings_of_the_library_appear_on_stderr(command, capsys):
    command(lambda options: logging.getLogger("singe").warning("the loader does not %s", "shuffle"))
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == "singe: warning: the loader does not shuffle\n"
    assert not any(isinstance(handler, cli._Above) for handler in logging.getLogger("singe").handlers)


@pytest.mark.parametrize("arguments", [[], ["prun"], ["prune"], ["demo", "--fast"], ["--config", "x"]])
def test_a_wrong_command_line_is_refused_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("singe") and "--help" in line


def test_a_mistyped_option_is_told_which_is_near(capsys):
    words = ["prune", "--model", "m:f", "--data", "d:f", "--rho", "0.5", "--out", "x"]
    for wrong in ("--round=8", "--fine-tune"):
        with pytest.raises(SystemExit) as caught:
            cli.main([*words, wrong])
        assert caught.value.code == 2
        near = "--round-to" if "round" in wrong else "--finetune"
        said = capsys.readouterr().err
        assert f"unrecognized arguments: {wrong}; perhaps {near} (see singe prune --help)" in said


def test_help_names_the_commands_and_exit_codes(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name}" in printed for name in commands.RUN) and "exit codes" in printed


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"singe {info.info()['singe']}\n"


def test_the_demo_prints(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda say: say("the demo"))
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().out == "the demo\n"


def test_info_is_printed(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(value in printed for value in info.info().values())


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    code = "import sys; from singe.cli import main; sys.exit(main(['info']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""
