import math
import re
from pathlib import Path

import pytest

from singe.cli import config, parse
from singe.cli.parser import build

BASE = 'model = "nets:tiny"\ndata = "nets:some"\nrho = 0.5\n'


@pytest.fixture
def parsed(place):
    def parse_with(text, *words, command="prune"):
        (place / "run.toml").write_text(text)
        return parse([command, "--config", "run.toml", *words])

    return parse_with


def test_a_file_says_what_the_command_line_could(parsed):
    file = BASE + 'round_to = 8\nignore = ["a.*", "b"]\nstructured = false\nmemory = "1MiB"\nrecalibrate_bn = 0\n'
    file += '[finetune]\nsteps = 20\nwhen = "after"\n[allocation]\n"layer4.*" = 2\nstem = 0\n'
    words = ["--model", "nets:tiny", "--data", "nets:some", "--rho", "0.5", "--round-to", "8", "--ignore", "a.*", "b"]
    words += ["--no-structured", "--memory", "1MiB", "--recalibrate-bn", "0", "--finetune", "steps=20", "when=after"]
    words += ["--allocation", "layer4.*=2", "stem=0"]
    said = vars(parse(["prune", *words]))
    assert vars(parsed(file)) == said | {"config": Path("run.toml")}


def test_the_command_line_wins(parsed):
    file = BASE + 'structured = false\nignore = ["a", "b"]\nfinetune = { steps = 3, lr = 1.0 }\n'
    options = parsed(file, "--rho", "0.25", "--structured", "--ignore", "c", "--finetune", "steps=4")
    assert options.rho == 0.25 and options.structured is True
    assert options.ignore == ["c"] and options.finetune == ["steps=4"]


def test_finetune_none_an_empty_list_and_switches(parsed):
    options = parsed(BASE + 'finetune = "none"\nignore = []\ndry_run = true\ntraceback = false\nprogress = false\n')
    assert options.finetune == ["none"] and options.ignore == []
    assert options.dry_run is True and options.traceback is False and options.progress is False


def test_one_file_serves_all_commands(parsed):
    options = parsed(BASE + 'round_to = 8\nignore = ["fc"]\n', command="inspect")
    assert options.model == "nets:tiny" and options.ignore == ["fc"] and not hasattr(options, "round_to")
    options = parsed(BASE, "pruned", "--onnx", "x.onnx", command="export")
    assert options.data == "nets:some" and str(options.directory) == "pruned"


@pytest.mark.parametrize(
    "text, message",
    [
        ("roundto = 8", "unknown name 'roundto' in run.toml, perhaps meant as round_to"),
        ("zzz = 8", "unknown name 'zzz' in run.toml$"),
        ("config = 'x'", "unknown name 'config'"),
        ("rho = ", "expected TOML in run.toml"),
        ("rho = true", "expected a value for rho in run.toml, got true"),
        ("structured = 'no'", 'expected true or false for structured in run.toml, got "no"'),
        ("rho = [0.5]", "expected a single value for rho in run.toml"),
        ("out = { a = 1 }", "expected a single value for out"),
    ],
)
def test_what_cannot_be_is_refused_by_name(parsed, text, message):
    with pytest.raises(ValueError, match=message):
        parsed(text)


def test_values_of_a_wrong_kind_are_refused_as_on_the_command_line(parsed, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(BASE + "round_to = 'wide'")
    assert caught.value.code == 2 and "--round-to: invalid int value: 'wide'" in capsys.readouterr().err


def test_a_file_has_to_be_named(capsys):
    with pytest.raises(SystemExit):
        parse(["prune", "--config"])
    assert "--config: expected one argument" in capsys.readouterr().err


def test_a_missing_file_is_refused(place):
    with pytest.raises(FileNotFoundError, match=r"found none at none\.toml"):
        parse(["prune", "--config", "none.toml"])


def test_what_is_written_is_read_again(place):
    said = {"model": 'a:b("ü")', "rho": 0.5, "structured": False, "ignore": ["a\\b", 'c"'], "round_to": 8}
    (place / "run.toml").write_text(config.written(said), encoding="utf-8")
    options = parse(["prune", "--data", "nets:some", "--config", "run.toml"])
    assert {name: getattr(options, name) for name in said} == said


def test_the_file_in_the_docs_is_one(parsed):
    page = Path(__file__).parents[2] / "docs" / "cli.md"
    (text,) = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    options = parsed(text)
    assert (options.rho, options.round_to, options.finetune) == (0.5, 8, ["steps=2000", "lr=0.01"])


def test_settings_are_the_names_of_the_library():
    _, commands = build()
    assert {"round_to", "finetune", "structured", "dry_run"} <= config.settings(commands["prune"]).keys()
    assert not {"help", "config", "directory"} & config.settings(commands["export"]).keys()


def test_what_is_infinite_is_read_again(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(config.written({"analysis_seconds": math.inf, "rho": 0.5}))
    assert config.tomllib.loads(path.read_text()) == {"analysis_seconds": math.inf, "rho": 0.5}
