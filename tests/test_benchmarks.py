"""The scripts in benchmarks/: networks, data, training, pruning and the zoo, on few and random images."""

import json
import sys
import textwrap
from functools import partial
from pathlib import Path

import cifar10
import folding
import gradual
import latency
import pytest
import reliability
import reliability_kills
import reliability_run
import scaling
import torch
import train_cifar10
import zoo
import zoo_checks
import zoo_singe
from measuring.isolated import findings
from models import CIFAR10_MODELS, MODELS, Network, load, random_images
from records import PER_FILE, write_records
from safetensors.torch import load_file, save_file
from small_resnet import SmallResNet
from torch import nn
from zoo_models import lively
from zoo_networks import NETWORKS
from zoo_table import page

import singe
from singe import demo
from singe.sizes import count_macs, count_parameters
from singe.storage.checkpoint import FILE

PARAMETERS = {
    "perceptron": 3_676_682,
    "resnet20": 272_474,
    "resnet56": 855_770,
    "resnet110": 1_730_714,
    "resnet20_a": 269_722,
    "resnet56_a": 853_018,
    "resnet110_a": 1_727_962,
    "vgg16_bn": 14_728_266,
    "mobilenet_v2": 2_236_682,
    "vgg16": 138_357_544,
    "resnet50": 25_557_032,
}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Canonical files of random records, few in each."""
    return write_records(tmp_path_factory.mktemp("cifar10"))


@pytest.fixture(scope="module")
def resnet8():
    """The name of a network that scripts know as long as this module is tested: one block in a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet8", Network(SmallResNet))
        CIFAR10_MODELS.append("resnet8")
        yield "resnet8"
        CIFAR10_MODELS.remove("resnet8")


@pytest.fixture(scope="module")
def weights(data, resnet8):
    """Those of a ResNet-8 after an epoch."""
    out = data / "trained" / "resnet8.safetensors"
    torch.manual_seed(1)  # does not matter: the script has its own seed
    train_cifar10.main(
        ["--model", resnet8, "--data", str(data), "--out", str(out), "--epochs", "1", "--batch-size", "32"]
    )
    return out


@pytest.fixture
def few_rounds(monkeypatch):
    """Networks are timed less often."""
    monkeypatch.setattr(singe, "latencies", partial(singe.latencies, rounds=2))


def script(path, code):
    """A file that runs code which can import the scripts."""
    path.write_text(f"import sys\n\nsys.path[:0] = {[str(Path(scaling.__file__).parent)]}\n{textwrap.dedent(code)}")
    return path


# -- networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_network_has_its_known_size_and_a_logit_for_each_class(name):
    with torch.device("meta"):  # shapes are all that is asked for
        model, (x, _) = load(name), random_images(2, name)
    assert not model.training
    assert count_parameters(model) == PARAMETERS[name]
    side, classes = (32, 10) if name in CIFAR10_MODELS else (224, 1000)
    assert x.shape == (2, 3, side, side)
    assert model(x).shape == (2, classes)


@pytest.mark.parametrize(("name", "macs"), [("vgg16", 15_470_264_320), ("resnet50", 4_089_184_256)])
def test_a_network_for_imagenet_takes_the_multiply_adds_it_is_known_for(name, macs):
    with torch.device("meta"):
        assert count_macs(load(name), random_images(1, name)[0]) == macs


def test_the_signal_gets_through_vgg16():
    torch.manual_seed(0)
    with torch.no_grad():
        assert 0.1 < float(load("vgg16")(random_images(1, "vgg16")[0]).std()) < 10


def test_a_shortcut_without_parameters_skips_pixels_and_adds_zeros():
    x = torch.randn(2, 16, 8, 8)
    y = load("resnet20_a").blocks[3].down(x)
    expected = torch.zeros(2, 32, 4, 4)
    for row in range(4):
        for column in range(4):
            expected[:, 8:24, row, column] = x[:, :, 2 * row, 2 * column]
    assert torch.equal(y, expected)


def test_the_kinds_of_shortcut_differ_only_there():
    a, b = (dict(load(name).state_dict()) for name in ("resnet20_a", "resnet20"))
    assert {key for key in b if ".down." not in key} == set(a)
    assert {key.split(".down.")[0] for key in b.keys() - a.keys()} == {"blocks.3", "blocks.6"}


def test_the_names_in_resnet56_stay_as_weights_have_them():
    parts = {key.rpartition(".")[0] for key in load("resnet56").state_dict()}
    blocks = {f"blocks.{n}.{part}" for n in range(27) for part in ("conv1", "bn1", "conv2", "bn2")}
    down = {f"blocks.{n}.down.{i}" for n in (9, 18) for i in (0, 1)}
    assert parts == {"stem.0", "stem.1", "fc"} | blocks | down


def test_load_names_the_networks_there_are():
    with pytest.raises(ValueError, match=r"resnet20, .*resnet50.*, got 'resnet21'"):
        load("resnet21")


def test_load_refuses_the_weights_of_another_network(weights):
    with pytest.raises(RuntimeError, match="Missing key"):
        load("resnet56", weights)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load("resnet20_a", weights)


# -- training ---------------------------------------------------------------------------------------------------


def test_training_writes_weights_that_load_and_what_they_are_worth(weights, data):
    trained = load_file(weights)
    for name, value in load("resnet8", weights).state_dict().items():
        assert torch.equal(trained[name], value)
    assert trained["stem.1.num_batches_tracked"] == 5
    report = json.loads(weights.with_suffix(".json").read_text())
    assert report["options"]["model"] == "resnet8" and report["options"]["epochs"] == 1
    assert report["parameters"] == count_parameters(load("resnet8"))
    assert report["top1_of_epochs"] == [report["top1"]] and 0 <= report["top1"] <= 1
    assert report["seconds"] > 0 and "torch" in report["machine"]
    assert str(data) not in json.dumps(report)


def test_training_is_repeatable_and_the_seed_matters(weights, data, tmp_path):
    trained = load_file(weights)["fc.weight"]
    for seed, same in (("0", True), ("1", False)):
        out = tmp_path / "again.safetensors"
        arguments = ["--epochs", "1", "--batch-size", "32", "--seed", seed]
        train_cifar10.main(["--model", "resnet8", "--data", str(data), "--out", str(out), *arguments])
        assert torch.equal(load_file(out)["fc.weight"], trained) == same


@pytest.mark.parametrize("device", DEVICES)
def test_training_in_bfloat16_leaves_float32_weights(data, tmp_path, device, resnet8):
    out = tmp_path / "resnet8.safetensors"
    arguments = ["--epochs", "1", "--batch-size", "160", "--bf16", "--device", device]
    train_cifar10.main(["--model", resnet8, "--data", str(data), "--out", str(out), *arguments])
    assert load_file(out)["fc.weight"].dtype == torch.float32


# -- pruning ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_pruning_reports_all_there_is_to_know(weights, data, tmp_path, capsys, device, few_rounds):
    arguments = ["--model", "resnet8", "--weights", str(weights), "--data", str(data), "--rho", "0.3"]
    arguments += ["--steps", "2", "--criterion", "magnitude", "--batch-size", "32", "--ignore", "stem"]
    arguments += ["--allocation", "uniform", "--compensate", "mean", "--device", device]
    cifar10.main([*arguments, "--json", str(tmp_path / "report.json")])
    text = (tmp_path / "report.json").read_text()
    report = json.loads(text)
    numbers = [f"{name}_{when}" for name in ("params", "macs") for when in ("before", "after", "removed")]
    numbers += [f"{name}_{when}" for name in ("top1", "latency_64", "latency_1") for when in ("before", "after")]
    numbers += [
        "seconds",
        "seconds_scoring",
        "seconds_compensating",
        "seconds_tuning",
        "neurons_scored",
        "neurons_removed",
    ]
    assert report.keys() == {"machine", "options", "frozen", *numbers}
    assert all(report[name] >= 0 for name in numbers)
    assert report["params_before"] == count_parameters(load("resnet8"))
    assert report["params_after"] == round(report["params_before"] * (1 - report["params_removed"]))
    assert report["params_removed"] == pytest.approx(0.3, abs=0.01)
    assert report["frozen"]["stem.0"] == "ignored"
    assert report["options"]["model"] == "resnet8" and report["options"]["weights"] == weights.name
    assert str(data) not in text
    printed = capsys.readouterr().out
    assert all(f"{name}: " in printed for name in numbers)


def test_pruning_is_by_the_options(weights, data, monkeypatch):
    class Caught(Exception):
        pass

    def prune(model, loader, rho, **arguments):
        raise Caught({"rho": rho, "batches": len(loader), **arguments})

    monkeypatch.setattr(singe, "prune", prune)
    text = "--rho .4 --target macs --allocation global --round-to 8 --ignore stem fc --nodes 7 --steps 9 --when after"
    text += " --compensate mean --compensation-images 40"
    text += f" --lr .1 --recalibrate-bn 3 --batch-size 16 --seed 5 --model resnet8 --weights {weights} --data {data}"
    with pytest.raises(Caught) as caught:
        cifar10.main(text.split())
    assert caught.value.args[0] == {
        "rho": 0.4, "target": "macs", "allocation": "global", "round_to": 8, "ignore": ["stem", "fc"], "seed": 5,
        "criterion": singe.IntegratedGradient(quadrature=singe.GaussLegendre(7)), "recalibrate_bn": 3,
        "finetune": singe.FineTune(steps=9, when="after", lr=0.1), "batches": 5 * PER_FILE // 16,
        "compensate": "mean", "compensation_images": 40,
    }  # fmt: skip
    with pytest.raises(Caught) as caught:
        cifar10.main([*text.split(), "--steps", "0", "--criterion", "magnitude"])
    assert caught.value.args[0]["finetune"] is None and caught.value.args[0]["criterion"] == "magnitude"


def test_pruning_refuses_random_weights(data, capsys):
    with pytest.raises(SystemExit):
        cifar10.main(["--data", str(data)])
    assert "random weights" in capsys.readouterr().err


# -- folding ----------------------------------------------------------------------------------------------------


def test_folding_reports_what_stays_and_why(tmp_path, monkeypatch, capsys, resnet8):
    def pre_activated(name):
        network = load(name)
        network.blocks[0].bn1 = torch.nn.Sequential(torch.nn.ReLU(), network.blocks[0].bn1)
        return network

    monkeypatch.setattr(folding, "load", pre_activated)
    monkeypatch.setitem(folding.SIDES, resnet8, 32)
    folding.main([resnet8, "--dtypes", "float32", "--json", str(tmp_path / "folding.json")])
    (outcome,) = json.loads((tmp_path / "folding.json").read_text())["outcomes"]
    assert (outcome["model"], outcome["norms"], outcome["folded"]) == (resnet8, 9, 8)
    assert outcome["dtype"] == "float32" and 0 < outcome["error"] < 1e-4 and 0 < outcome["rounding"] < 1e-4
    ((reason, names),) = outcome["unfolded"].items()
    assert names == ["blocks.0.bn1.1"] and reason.startswith("before it comes aten.relu.default in blocks.0.bn1.0;")
    printed = capsys.readouterr().out
    assert "resnet8: 1 stays: before it comes aten.relu.default; after it comes aten.relu.default" in printed


def test_folding_starts_with_batch_norms_far_from_their_defaults_through_which_signals_get():
    torch.manual_seed(0)
    x, _ = random_images(4, "resnet20")
    model = folding.randomised(load("resnet20"), x)
    assert not model.training
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        assert norm.momentum == 0.1
        for tensor, default in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
            assert (tensor - default).abs().max() > 1e-3
    with torch.no_grad():
        assert model(x).std(0).max() > 1e-2


# -- latency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_latency_is_compared_in_turns_for_every_batch_and_written_with_the_load(tmp_path, capsys, device, resnet8):
    arguments = ["--models", resnet8, "--rho", "0.5", "--round-to", "1", "4", "--batches", "1", "2", "--rounds", "2"]
    latency.main([*arguments, "--device", device, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["networks"][resnet8]
    assert [(p["target"], p["rho"], p["round_to"]) for p in found["pruned"]] == [("params", 0.5, 1), ("params", 0.5, 4)]
    assert all(abs(p["params_removed"] - 0.5) < 0.05 for p in found["pruned"])
    assert list(found["batches"]) == ["1", "2"]
    for batch in found["batches"].values():
        medians = [p["median"] for p in batch["pruned"]]
        assert batch["speedup"] == pytest.approx([batch["unpruned"]["median"] / median for median in medians])
        busy = [p["median"] for p in batch["cpu_seconds"]]
        assert batch["speedup_of_cpu_seconds"] == pytest.approx([busy[0] / median for median in busy[1:]])
        assert len(busy) == 3 and min(busy) > 0 and len(batch["load"]) == 2
    printed = capsys.readouterr().out
    assert "resnet8: " in printed and f"{found['batches']['1']['speedup'][0]:.2f}x" in printed


# -- the zoo ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_in_a_lively_model_nothing_is_constant_and_all_is_repeatable(name):
    model, inputs = lively(f"own/{name}")
    again, same = lively(f"own/{name}")
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(inputs, same, strict=True))
    for (key, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other)
        assert value.numel() == 1 or value.min() < value.max(), key
    outputs = torch.utils._pytree.tree_leaves(model(*inputs))
    assert all(0.01 < float(output.detach().std()) < 100 for output in outputs)


def test_mutants_of_good_files_are_refused_or_read(tmp_path):
    reliability.main(["files", "--count", "60", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["files"]
    assert found["inputs"] == 240 and found["errors"] == {} and found["executed"] == []
    assert all(n["refused"] + n["read"] == 60 and n["refused"] > 30 for n in found["files"].values())
    assert found["mebibytes_at_most"] is None or found["mebibytes_at_most"] < 50


UNSOUND_RUN = """
    import json, sys, time
    from pathlib import Path

    directory = Path(sys.argv[2])
    again = directory.exists()
    directory.mkdir(exist_ok=True)
    time.sleep(1)
    print(json.dumps({"plan": "the same", "weights": again, "groups": 2}))
"""


def test_a_killed_run_is_made_again_and_compared_with_the_whole_one(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    assert Path(reliability_run.__file__) == reliability_kills.SCRIPT
    monkeypatch.setattr(reliability_kills, "SCRIPT", script(tmp_path / "run.py", UNSOUND_RUN))
    monkeypatch.setattr(demo, "train", lambda model, loader, epochs: model)
    reliability.main(["kills", "--count", "1", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["kills"]
    (kill,) = found["kills"]
    assert kill["same_plan"] and not kill["same_weights"] and kill["groups"] is None
    assert 0 < kill["moment"] < found["seconds"] and found["groups"] == 2


def test_the_run_to_kill_tells_what_it_came_to(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    save_file(demo.DigitNet().state_dict(), tmp_path / "weights")
    prune, less = singe.prune, {"criterion": "magnitude", "allocation": "uniform", "compensate": "none"}
    less["finetune"] = singe.FineTune(steps=6)
    monkeypatch.setattr(singe, "prune", lambda *arguments, **options: prune(*arguments, **options | less))
    told = []
    for directory in ("one", "one", "another"):
        reliability_run.main([str(tmp_path / "weights"), str(tmp_path / directory)])
        told.append(json.loads(capsys.readouterr().out))
        assert told[-1].pop("seconds") > 0 and (tmp_path / directory / FILE).exists()
    assert told[0] == told[1] == told[2] and told[0]["groups"] > 1


def test_prunes_are_repeated(tmp_path):
    reliability.main(["repeats", "--count", "3", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())["repeats"]
    assert found["prunes"] == 3 and len(found["resident_mebibytes"]) == 4


def test_a_process_of_its_own_is_heard_until_it_fails():
    def run(script, seconds=60.0):
        return findings([sys.executable, "-c", script], seconds)

    assert run("print('{\"a\": 1}'); print('{\"b\": 2}')") == {"a": 1, "b": 2}
    late = "import time; print('{\"a\": 1}', flush=True); print('{\"b', end='', flush=True); time.sleep(60)"
    assert run(late, 1.5) == {"a": 1, "stopped": "time limit of 1.5 s"}
    assert run("import os; os.kill(os.getpid(), 9)") == {"stopped": "killed by SIGKILL"}
    assert run("1 / 0") == {"stopped": "exit code 1: ZeroDivisionError: division by zero"}


def test_what_no_longer_trains_is_found():
    torch.manual_seed(0)
    x = (torch.randn(4, 3),)
    model, broken = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)) for _ in range(2))
    assert zoo_checks.learning(model, x) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(p.grad is None for p in model.parameters()) and model[1].num_batches_tracked == 0
    assert zoo_checks.training_problem(broken, x, model) is None
    broken[1] = nn.BatchNorm1d(2, affine=False)
    assert zoo_checks.training_problem(broken, x, model) == "no gradient for 1.bias, 1.weight"
    broken[1] = nn.BatchNorm1d(3)
    assert "RuntimeError: running_mean should contain 2 elements" in zoo_checks.training_problem(broken, x, model)


def test_a_parameter_that_is_no_longer_shared_is_found():
    model, parted = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    model[1].weight = model[0].weight
    assert zoo_checks.shared(model) == {("0.weight", "1.weight")}
    assert zoo_checks.training_problem(model, (torch.ones(2, 3),), model) is None
    assert zoo_checks.training_problem(parted, (torch.ones(2, 3),), model) == "no longer shared: 0.weight, 1.weight"


def test_differences_are_relative_to_each_output():
    class Two(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.shift = shift

        def forward(self, x):
            return {"small": x + self.shift, "large": 100 * x}

    x = (torch.tensor([[1.0, -2.0]]),)
    assert zoo_checks.largest_difference(Two(0.5), Two(0.0), x) == 0.25
    assert zoo_checks.shapes(Two(0.0), x) == [(1, 2), (1, 2)]


def test_errors_are_told_in_a_line_without_folders():
    error = ValueError("in /usr/lib/net.py:3 (a/b)\nand more")
    assert zoo_checks.described(error) == "ValueError: in net.py:3 (a/b)"
    assert zoo_checks.described(RuntimeError("can't allocate memory: you tried")) == "memory limit"


WHERE = {"processor": "abacus", "threads": 3, "date": "today", "revision": "0f"}


def test_the_zoo_measures_what_is_named_and_keeps_the_rest(tmp_path, capsys):
    file, out = tmp_path / "zoo.json", tmp_path / "docs" / "zoo.md"
    before = {"singe": WHERE | {"stopped": "time limit of 9 s"}}
    kept = {"own/unet": before, "own/bare_parameters": {"torch_pruning": WHERE | {"problem": "kept"}}}
    file.write_text(json.dumps({"rows": kept}))
    zoo.main(["own/bare*", "--no-peers", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["machine"]["torch"] == torch.__version__ and found["options"]["models"] == ["own/bare_parameters"]
    assert list(found["rows"]) == ["own/unet", "own/bare_parameters"] and found["rows"]["own/unet"] == before
    row = found["rows"]["own/bare_parameters"]
    assert row["torch_pruning"] == WHERE | {"problem": "kept"}
    analysis = row["singe"]["analysis"]
    assert analysis["params"] == 3 * 9 * 16 + 32 + 24 * (16 * 9 + 1 + 1) + 25 * 5
    assert analysis["macs"] == 16 * 16 * 9 * (3 * 16 + 16 * 24) + 24 * 5
    assert analysis["units"] == 16 + 24 + 5 and analysis["frozen"]["network output"] == 5
    for share in (0.3, 0.6):
        pruned = row["singe"][str(share)]
        assert pruned["problem"] is None and pruned["difference"] <= 1e-4
        assert pruned["params"] == pytest.approx(share * analysis["removable"], abs=0.05)
        assert pruned["macs"] > 0 < pruned["seconds"]
    zoo.main(["--json", str(file), "--table", str(out)])
    text = out.read_text()
    assert "singe: 1 of 2 models pass" in text and "Torch-Pruning: 0 of 1 models pass" in text
    assert "| `own/unet` | - | - | - | time limit of 9 s |" in text
    assert str(tmp_path) not in text + file.read_text()


def test_reasons_of_one_kind_add_up():
    model = nn.Sequential(nn.Conv1d(3, 4, 1))
    kind = zoo_singe._kind
    assert kind("the weight 0.weight is used more than once", model) == "the weight … is used more than once"
    assert kind("no rule for aten.conv2d.default in 0", model) == "no rule for aten.conv2d.default"
    assert kind("trial removal failed: shape [4, 21] in 7", model) == "trial removal failed: shape [n, n] in n"
    assert zoo_singe._rows(model, "0") == 4 and zoo_singe._rows(model, "0.bias") == 0


def test_the_zoo_names_the_models_there_are(capsys):
    with pytest.raises(SystemExit):
        zoo.main(["own/unett"])
    assert "own/unet, own/pixel_shuffle" in capsys.readouterr().err


def test_the_table_of_the_zoo_says_what_failed():
    analysis = {"params": 1000, "macs": 1, "groups": 2, "units": 20, "removable": 0.5, "seconds": 1.25}
    analysis["frozen"] = {"a | b": 4, "network output": 3, "c": 2, "d": 1}
    good = {"rho": 0.1, "seconds": 1.0, "params": 0.1, "macs": 0.2, "difference": 2e-7, "problem": None}
    row = {
        "singe": WHERE | {"revision": "1a", "analysis": analysis, "0.3": good, "stopped": "time limit of 9 s"},
        "torch_pruning": WHERE
        | {
            "0.3": {"building": 0.5, "pruning": 0.25, "params": 0.5, "problem": None},
            "0.6": {"building": 0.5, "pruning": 0.25, "params": 0.8, "problem": "KeyError: 7"},
        },
    }
    options = {"seconds": 9.0, "memory": 2**30}
    text = page({"machine": {"torch": "2"}, "options": options, "versions": {"timm": "1"}, "rows": {"own/unet": row}})
    whole = "50%: a \\| b 4; network output 3; c 2; 1 more"
    pruned = "1.2 s | 10.0% | 2e-07 | yes | - | - | time limit of 9 s"
    peer = "0.5 + 0.2 s | 50.0% | 80.0%, but KeyError: 7"
    assert f"| `own/unet` | 1,000 | 2 | 20 | {whole} | {pruned} | {peer} |" in text
    assert "singe: 0 of 1 models" in text and "Torch-Pruning: 0 of 1 models" in text
    assert (
        "1 GiB" in text
        and "torch 2, timm 1; singe on 3 threads of an abacus for each process, today, revision 1a" in text
    )


def test_gradual_pruning_is_compared_with_the_same_training_unpruned_and_by_magnitude(
    data, tmp_path, capsys, monkeypatch, few_rounds
):
    monkeypatch.setattr(gradual, "load", lambda _: SmallResNet())
    text = f"--data {data} --epochs 2 --every 1 --until 1 --per-round 40 --images 8 --batch-size 80"
    gradual.main([*text.split(), "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["schedule"] == {"every": 1, "per_round": 40, "until": 1}
    assert list(report["runs"]) == ["none", "feature_relevance", "magnitude"]
    for score, found in report["runs"].items():
        assert len(found["top1_of_epochs"]) == 2
        assert ("channels" in found) == (score != "none")
    by_relevance, by_magnitude = report["runs"]["feature_relevance"], report["runs"]["magnitude"]
    assert by_relevance["channels"] == by_magnitude["channels"] == 40
    assert by_relevance["widths"] != by_magnitude["widths"]
    assert by_relevance["params_before"] > by_relevance["params_after"]
    assert by_relevance["round_per_epoch"] > 0
    assert "feature_relevance" in capsys.readouterr().out


def test_the_published_run_is_a_command():
    options = gradual.parse(["--data", "somewhere", "--full"])
    assert (options.model, options.epochs) == ("resnet110", 200)
    assert gradual.schedule(options) == singe.gradual_preset("resnet110_cifar")
    shorter = gradual.parse(["--data", "somewhere", "--model", "vgg16_bn", "--epochs", "40", "--per-round", "50"])
    assert gradual.schedule(shorter) == singe.gradual_preset("vgg16_cifar10", 40) | {"per_round": 50}


# -- several processes ------------------------------------------------------------------------------------------


SMALL_NETWORK = """
    from functools import partial

    import scaling
    from models import MODELS, Network
    from models.cifar import CifarResNet

    MODELS["resnet8"] = Network(partial(CifarResNet, 1))
    scaling.main()
"""


def test_what_processes_take_together_and_hand_over_is_reported(tmp_path, capsys, monkeypatch, resnet8):
    monkeypatch.setattr(scaling, "__file__", str(script(tmp_path / "scaling_resnet8.py", SMALL_NETWORK)))
    arguments = ["--model", resnet8, "--groups", "blocks.2.conv1", "--rho", "0.02", "--batch", "8"]
    scaling.main([*arguments, "--criterion", "gradient", "--processes", "2", "--json", str(tmp_path / "out.json")])
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert run["processes"] == 2 and run["same_plan"] and run["neurons"] == 64
    assert run["processor_seconds"] > run["scoring"] > 0 and run["sent"] >= 8 * run["scored"]
    assert f"{run['sent'] / run['removals']:.0f}" in capsys.readouterr().out


def test_processes_that_come_to_different_plans_are_no_measurement():
    with pytest.raises(RuntimeError, match="2 processes came to different plans"):
        scaling.summed(2, [{"plan": 1}, {"plan": 2}])
