"""What benchmarks/ measures of speed, memory and ranks, on a ResNet-8 and few images; expected numbers by hand."""

import contextlib
import io
import json
import os
import stat
import subprocess
import time
from functools import partial
from pathlib import Path

import ceilings
import growth
import memory
import pytest
import quadrature
import speed
import torch
from engine import layers, literal, ranks
from engine.baselines import BASELINES
from engine.floor import row_macs, suffix_macs
from engine.subject import prepare
from measuring import peak
from measuring.common import duration, mebibytes, spearman
from measuring.peak import with_peak
from measuring.timing import in_turns, timed
from models import MODELS, Network, load, random_images
from models.cifar import CifarResNet
from records import write_records
from safetensors.torch import save_file

import singe
from singe.models.precision import arithmetic
from singe.records import GroupRecord
from singe.scoring.engine import Engine
from singe.sizes import count_parameters

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CPU = torch.device("cpu")
GPU_SCRIPT = Path(growth.__file__).with_name("gpu.sh")

# multiply-adds of a ResNet-8 for one image
STEM = 3 * 16 * 9 * 32**2
CONV = 16 * 16 * 9 * 32**2  # any that keeps channels and pixels
STRIDING, DOWN = CONV // 2, CONV // 18  # twice the channels from half the pixels a side; the 1x1 beside it
HEAD = 64 * 10
ALL = STEM + 2 * CONV + 2 * (STRIDING + DOWN + CONV) + HEAD


@pytest.fixture(scope="module", autouse=True)
def resnet8():
    """The smallest network of its kind: one block a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet8", Network(partial(CifarResNet, 1)))
        patch.setattr("speed.CIFAR10_MODELS", ["resnet8"])
        patch.setattr("quadrature.CIFAR10_MODELS", ["resnet8"])
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with images, and with weights in ``weights.safetensors``."""
    folder = write_records(tmp_path_factory.mktemp("files"))
    torch.manual_seed(0)
    save_file(load("resnet8").state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return prepare(speed.parse(["--model", "resnet8", "--batch", "4"]))


@pytest.fixture(scope="module")
def report(files):
    """All parts of speed.py: what it writes, and what it prints."""
    text = "--model resnet8 --batch 2 --nodes 2 1 --neurons 2 --rounds 1 --rho .3 --rank-layers blocks.0.conv1"
    text += f" --rank-batches 1 --weights {files}/weights.safetensors --data {files} --json {files}/out/speed.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        speed.main(text.split())
    written = (files / "out" / "speed.json").read_text()
    assert str(files) not in written
    return json.loads(written), printed.getvalue()


# -- helpers ----------------------------------------------------------------------------------------------------


def test_spearman_is_the_correlation_of_ranks():
    a = torch.tensor([1.0, 2, 3, 4, 5])
    assert spearman(a, a.exp()) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, torch.tensor([2.0, 1, 4, 3, 50])) == pytest.approx(1 - 6 * 4 / (5 * 24))


def test_durations_and_bytes_are_readable():
    assert [duration(s) for s in (0.5, 90, 7200, 172_800)] == ["0.50 s", "1.5 min", "2.0 h", "2.0 days"]
    assert mebibytes(3 << 20) == "3" and mebibytes(None) == "-"


@pytest.mark.parametrize("device", DEVICES)
def test_a_call_is_timed_and_its_result_kept(device):
    result, seconds = timed(lambda: time.sleep(0.05) or "done", torch.device(device))
    assert result == "done" and 0.05 <= seconds < 10


def test_ways_take_turns_and_their_median_counts(monkeypatch):
    calls, clock = [], iter([1, 10, 5, 30, 2, 20])
    monkeypatch.setattr("measuring.timing.timed", lambda way, device: (way(), next(clock)))
    ways = {name: partial(calls.append, name) for name in "ab"}
    assert in_turns(ways, 3, CPU) == {"a": 2, "b": 20}
    assert "".join(calls) == "ababab"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
def test_the_peak_of_a_call_is_what_it_had_at_once_and_no_other_had():
    # above 32 MiB glibc asks the system for each block, and gives it back at once; below, it may fill what lies free
    def allocate(mebibytes):
        return float(torch.ones(mebibytes << 18).sum())

    total, large = with_peak(lambda: allocate(160), CPU)
    assert total == 160 << 18 and 150 << 20 < large < 200 << 20
    assert 35 << 20 < with_peak(lambda: allocate(40), CPU)[1] < 75 << 20
    assert with_peak(lambda: [allocate(40) for _ in range(4)], CPU)[1] < 75 << 20


@pytest.mark.skipif("cuda" not in DEVICES, reason="needs a GPU")
def test_the_peak_on_cuda_is_of_tensors():
    held = torch.ones(1 << 20, device="cuda")
    assert with_peak(lambda: float((held + 1).sum()), held.device)[1] in range(4 << 20, 5 << 20)


def test_where_the_peak_cannot_be_reset_it_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "_RESET", tmp_path / "nothing" / "clear_refs")
    assert with_peak(lambda: 3, CPU) == (3, None)


# -- layers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DEVICES)
def scored(request):
    """A network without batch norms, a batch, a quadrature, and the engine's scores of a layer."""
    torch.manual_seed(0)
    x, y = (t.to(request.param) for t in random_images(4))
    model, quadrature = singe.fold_batchnorm(load("resnet8").to(request.param), x).model, singe.GaussLegendre(2)
    criterion = singe.IntegratedGradient(quadrature=quadrature)
    return model, (x, y), quadrature.dt(), singe.score(model, (x, y), "blocks.2.conv1", criterion=criterion)


@pytest.mark.parametrize("way", BASELINES)
def test_a_baseline_computes_what_the_engine_computes(way, scored):
    model, batch, nodes, expected = scored
    before = {name: value.clone() for name, value in model.state_dict().items()}
    neurons = torch.tensor([5, 2, 63])
    with arithmetic("float32", batch[0].device):
        scores = BASELINES[way](model, batch, "blocks.2.conv1", neurons, nodes)
    torch.testing.assert_close(scores.cpu(), expected[neurons], rtol=1e-3, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_vmap_takes_as_many_jobs_at_once_as_it_may(subject):
    (batch,) = subject.batches(1)
    way = partial(
        BASELINES["vmap"], subject.folded, batch, "blocks.1.conv1", torch.arange(3), singe.GaussLegendre(2).dt()
    )
    torch.testing.assert_close(way(at_once=4), way(), rtol=1e-4, atol=0)


def test_layers_that_can_be_pruned_alone_are_measured(subject):
    assert [g.name for g in subject.groups] == [f"blocks.{i}.conv1" for i in range(3)]
    assert set(subject.coupled) == {"stem.0", "blocks.1.conv2", "blocks.2.conv2"}
    with pytest.raises(ValueError, match=r"among blocks\.0\.conv1, .*got 'fc'"):
        subject.matching("fc")


def test_multiply_adds_behind_a_layer_and_of_a_row(subject):
    first, _, last = subject.groups
    assert suffix_macs(subject, first) == CONV + 2 * (STRIDING + DOWN + CONV) + HEAD
    assert suffix_macs(subject, last) == CONV + HEAD
    assert [row_macs(subject, g) for g in (first, last)] == [16 * 9 * 32**2, 32 * 9 * 8**2]


def test_a_row_compares_ways_and_rows_add_up_by_their_neurons():
    def row(neurons, engine, backward, peak):
        seconds = {way: backward for way in layers.WAYS} | {"engine": engine}
        return layers.Row("x", neurons, 8, 1, seconds, {way: 10 * s for way, s in seconds.items()}, engine / 2, peak)

    rows = [row(1, 1.0, 6.0, 5), row(3, 2.0, 10.0, None)]
    assert rows[0].ratio("vmap") == rows[0].limit("vmap") == 6 and rows[0].over_floor == 2
    everything = layers.total(rows)
    assert (everything.neurons, everything.peak) == (4, 5)
    assert everything.seconds["engine"] == 7 / 4 and everything.floor == 7 / 8
    assert everything.ratio("backward") == everything.limit("backward") == pytest.approx(36 / 7)


def test_speed_is_reported_layer_by_layer_with_what_bounds_it(report):
    result, printed = report
    rows = {row["layer"]: row for row in result["layers"]["rows"]}
    assert list(rows) == [f"blocks.{i}.conv1" for i in range(3)]
    for row in rows.values():
        assert set(row["seconds"]) == set(row["macs"]) == {"engine", *BASELINES}
        assert min(*row["seconds"].values(), row["floor"], row["jobs"], row["parts"]) > 0
        assert row["ratio"]["vmap"] == row["seconds"]["vmap"] / row["seconds"]["engine"]
        assert row["peak"] is None or row["peak"] > 0
    macs, jobs = rows["blocks.2.conv1"]["macs"], 2 * 2  # nodes, images
    assert macs["backward"] == jobs * (3 * ALL - STEM)  # nobody asks for the images' gradient
    assert macs["to the layer"] == jobs * (ALL + CONV + HEAD + STRIDING)
    assert macs["vmap"] == 2 * jobs * (STRIDING + CONV + HEAD)  # what is in front runs once for many jobs
    row = 32 * 9 * 8**2
    assert jobs * row < macs["engine"] <= jobs * (2 * (CONV + HEAD) + row)
    assert result["layers"]["all"]["neurons"] == 16 + 32 + 64
    assert "over the floor" in printed and "backward (limit)" in printed


# -- the whole algorithm ----------------------------------------------------------------------------------------


def test_passes_are_all_neurons_left_at_every_node_before_every_removal():
    assert literal.NODES == 91
    assert literal.count_passes(16, 3) == 91 * (16 + 15 + 14)
    assert literal.count_passes(5, 4, nodes=2) == 2 * (5 + 4 + 3 + 2)


def test_the_literal_cost_is_passes_times_seconds_with_pruned_layers_whole_or_cut(subject, monkeypatch):
    sizes = []

    def pass_seconds(networks, batch, layer, rounds):
        sizes.append([count_parameters(networks[name]) for name in ("whole", "smaller")])
        return {"whole": 2.0, "smaller": 1.0}

    monkeypatch.setattr(literal, "_pass_seconds", pass_seconds)
    history = [
        GroupRecord(group.name, group.size, removed, (), 0, 0, 0, 0, 0, 0, 0, {})
        for group, removed in zip(subject.groups, [(3, 1), (4,), (0, 9, 2)], strict=True)
    ]
    (batch,) = subject.batches(1)
    cost = literal.extrapolate(subject, batch, history)
    assert [g.passes for g in cost.groups] == [91 * (16 + 15), 91 * 32, 91 * (64 + 63 + 62)]
    assert cost.passes == 91 * 252 and cost.whole == 2 * cost.passes and cost.smaller == cost.passes
    assert cost.timed == 21
    # a row, its bias, which folding leaves, and a column of the next layer for each that is gone
    whole, first, second = count_parameters(subject.folded), 2 * (16 * 9 + 1 + 16 * 9), 16 * 9 + 1 + 32 * 9
    assert sizes == [[whole, whole], [whole, whole - first], [whole, whole - first - second]]


def test_a_timed_pass_fades_and_runs_forward_and_back_once(subject, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return BASELINES["backward"](*arguments)

    monkeypatch.setattr(literal, "backward", counted)
    (batch,) = subject.batches(1)
    seconds = literal._pass_seconds({"whole": subject.folded}, batch, "blocks.0.conv1", 3)
    assert seconds["whole"] > 0 and len(calls) == 1 + 3
    *_, neurons, nodes = calls[0]
    assert len(neurons) == len(nodes[0]) == 1 and 0 < float(nodes[0]) < 1


def test_the_whole_run_is_measured_against_the_literal_one(report):
    result, printed = report
    cost, runs = result["whole"]["literal"], result["whole"]["runs"]
    assert [run["nodes"] for run in runs] == [2, 1]
    for run in runs:
        assert run["seconds"] > sum(r["seconds_scoring"] for r in run["history"]) > 0
        assert run["params_removed"] == pytest.approx(0.3, abs=0.01)
        assert [r["group"] for r in run["history"]] == [f"blocks.{i}.conv1" for i in range(3)]  # no stream
        assert run["ratio_whole"] == pytest.approx(cost["seconds"]["whole"] / run["seconds"])
        removed = sum(len(r["removed"]) for r in run["history"])
        assert run["scored_per_removal"] == sum(r["neurons_scored"] for r in run["history"]) / removed >= 1
    for record, group in zip(runs[0]["history"], cost["groups"], strict=True):
        left = range(record["size"], record["size"] - len(record["removed"]), -1)
        assert group["passes"] == 91 * sum(left) > 0
    assert cost["seconds"]["whole"] == pytest.approx(sum(g["passes"] * g["whole"] for g in cost["groups"]))
    assert cost["timed"] >= 20
    assert f"literal: {cost['passes']:,} passes at 91 nodes" in printed


# -- ranks ------------------------------------------------------------------------------------------------------


def test_agreement_is_of_ranks_of_the_least_and_of_the_lower_half():
    exact = torch.tensor([1.0, 2, 3, 4, 5])
    found = ranks.agreement(torch.tensor([2.0, 5, 1, 3, 4]), exact)
    assert found == {"spearman": pytest.approx(0.2), "same_least": False, "same_half": 0.5}
    assert ranks.agreement(exact.exp(), exact) == {"spearman": pytest.approx(1), "same_least": True, "same_half": 1}


def test_layers_to_rank_are_spread_over_the_depth():
    assert ranks.spread([f"blocks.{i}" for i in range(27)]) == ["blocks.1", "blocks.12", "blocks.24"]
    assert ranks.spread(["a"]) == ["a"]


def test_every_shortcut_is_ranked_against_the_exact_score(report):
    result, printed = report
    shortcuts = {s["shortcut"]: s for s in result["ranks"]["shortcuts"]}
    assert {"4 nodes", "2 nodes", "4 nodes, bfloat16"} <= set(shortcuts)
    for s in shortcuts.values():
        assert s["layer"] == "blocks.0.conv1" and s["spearman"] > 0.8
        assert s["seconds_exact"] > s["seconds"] > 0
    assert "Spearman" in printed


def test_shortcuts_are_scored_in_their_precision(subject, monkeypatch):
    asked = []

    class Recorded(Engine):
        def __init__(self, *arguments, **options):
            asked.append(options["precision"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(ranks, "Engine", Recorded)
    monkeypatch.setattr(ranks, "EXACT", singe.Geometric(0.5))
    (batch,) = subject.batches(1)
    found = ranks._agreements(subject, subject.groups[2], batch, 1 << 30)
    assert [a.shortcut for a in found] == ["4 nodes", "2 nodes", "4 nodes, bfloat16"]
    assert asked == ["float32", "float32", "float32", "bfloat16"]


def test_lazy_and_full_rescoring_remove_half_of_a_layer(report):
    result, _ = report
    (found,) = result["ranks"]["refreshes"]
    lazy, full = found["lazy"], found["full"]
    assert found["removed"] == len(lazy["kept"]) == len(full["kept"]) == 8
    assert found["in_common"] == len(set(lazy["kept"]) & set(full["kept"])) / 8
    assert full["scored"] == sum(range(9, 17)) and 16 + 7 <= lazy["scored"] < full["scored"]
    assert all(way["loss"] != found["loss_before"] for way in (lazy, full))  # something is gone
    assert found["loss_before"] != found["loss_elsewhere_before"]


# -- growth, ceilings, quadrature -------------------------------------------------------------------------------


def test_a_line_is_fitted_and_its_exponent():
    line = growth.fitted("x", {1: 3.0, 2: 5.0, 4: 9.0})
    assert (line.slope, line.intercept, line.r2) == pytest.approx((2, 1, 1))
    parabola = growth.fitted("x", {1: 3.0, 2: 12.0, 4: 48.0})
    assert parabola.exponent == pytest.approx(2) and parabola.r2 < 0.99


def test_values_double_up_to_the_largest():
    assert growth.doublings(64, 3) == [16, 32, 64]
    assert growth.doublings(4, 9) == [1, 2, 4]


def test_growth_has_a_curve_for_each_quantity(tmp_path, capsys):
    text = "--model resnet8 --batch 4 --neurons 2 --nodes 1 --points 3 --rounds 1 --layer blocks.1.conv1 --json"
    growth.main([*text.split(), str(tmp_path / "growth.json")])
    curves = {c["quantity"]: c for c in json.loads((tmp_path / "growth.json").read_text())["curves"]}
    behind = [CONV + HEAD, 2 * CONV + STRIDING + DOWN + HEAD, 3 * CONV + 2 * (STRIDING + DOWN) + HEAD]
    expected = {"neurons": [8, 16, 32], "nodes": [1, 2, 4], "images": [1, 2, 4]}
    assert {q: c["x"] for q, c in curves.items()} == {**expected, "multiply-adds behind the layer": behind}
    assert all(len(c["seconds"]) == 3 and min(c["seconds"]) > 0 for c in curves.values())
    assert "exponent" in capsys.readouterr().out


def test_growth_is_plotted_panel_by_panel(tmp_path):
    curves = [growth.fitted(name, {1: 1.0, 2: 2.1, 3: 2.9}) for name in ("neurons", "nodes", "images", "behind")]
    growth.plot(curves, tmp_path / "new" / "growth.svg")
    drawn = (tmp_path / "new" / "growth.svg").read_text()
    assert all(f"<!-- {curve.quantity} -->" in drawn for curve in curves)


def test_memory_is_measured_beside_what_was_given(tmp_path, capsys):
    given = [1 << 20, 1 << 30]
    arguments = ["--model", "resnet20", "--batch", "4", "--layers", "blocks.0.conv1", "--memory", *map(str, given)]
    memory.main([*arguments, "--json", str(tmp_path / "memory.json")])
    uses = json.loads((tmp_path / "memory.json").read_text())["uses"]
    assert [(u["layer"], u["memory"]) for u in uses] == [("blocks.0.conv1", m) for m in given]
    assert uses[0]["parts"] == 4 and uses[0]["jobs"] == 1 and all(u["parts"] == 1 for u in uses[1::2])
    assert all(u["peak"] is None or u["peak"] >= 0 for u in uses)
    assert "parts" in capsys.readouterr().out


def test_ceilings_are_measured(tmp_path, capsys):
    ceilings.main(["--mebibytes", "4", "--side", "64", "--rounds", "1", "--json", str(tmp_path / "ceilings.json")])
    result = json.loads((tmp_path / "ceilings.json").read_text())
    assert result["copy_bytes_per_second"] > 0
    assert result["matmul_multiply_adds_per_second"].keys() == {"float32", "bfloat16"}
    assert min(result["matmul_multiply_adds_per_second"].values()) > 0
    assert "GB/s" in capsys.readouterr().out


def test_a_ceiling_counts_bytes_both_ways_and_multiply_adds(monkeypatch):
    monkeypatch.setattr(ceilings, "best", lambda way, rounds, device: way() is None or 0.5)
    assert ceilings.copy_bandwidth(1 << 20, CPU, 1) == 4 * 2**20
    assert ceilings.matmul("float32", 8, CPU, 1) == 2 * 8**3


def test_quadratures_are_ranked(files, tmp_path, capsys, monkeypatch, one_export):
    monkeypatch.setattr(quadrature, "EXACT", singe.Geometric(0.7))
    text = f"--model resnet8 --weights {files}/weights.safetensors --data {files} --images 2 --layers blocks.0.conv1"
    quadrature.main([*text.split(), "--json", str(tmp_path / "ranks.json")])
    rows = json.loads((tmp_path / "ranks.json").read_text())["rows"]
    assert [row["quadrature"] for row in rows] == list(quadrature.QUADRATURES)
    assert all(row["spearman"] > 0.5 for row in rows)
    assert "GaussLegendre(4)" in capsys.readouterr().out


def test_cifar10_is_for_networks_of_its_size_only(files, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--model", "vgg16", "--data", str(files)])
    assert "expected a model for CIFAR-10" in capsys.readouterr().err


# -- on a GPU ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run_gpu_script(tmp_path):
    """Runs gpu.sh with a Python and a sanitizer that only note how they are called; building fails."""
    fakes = {"python3": 'case "$*" in *pip*) exit 3;; *"import matplotlib"*) exit 1;; esac', "compute-sanitizer": ""}
    for name, body in fakes.items():
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f'#!/bin/sh\necho "{name} $*" >>"$CALLS"\necho output of {name}\n{body}\n')
        fake.chmod(fake.stat().st_mode | stat.S_IXUSR)

    def run(**environment):
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment |= {"PATH": path, "CALLS": str(tmp_path / "calls")}
        done = subprocess.run(["bash", GPU_SCRIPT, tmp_path / "out"], env=os.environ | environment, capture_output=True)
        return done.returncode, (tmp_path / "out" / "summary.txt").read_text(), (tmp_path / "calls").read_text()

    return run


def test_the_gpu_script_notes_what_fails_and_goes_on(run_gpu_script, tmp_path):
    failed, summary, calls = run_gpu_script()
    assert failed == 1 and "build: exit 3" in summary
    for step in ("info", "ceilings", "tests", "memcheck", "racecheck", "operators", "speed", "vgg16", "growth"):
        assert f"{step}: exit 0" in summary
    assert "missing: matplotlib" in summary and "--plot" not in calls
    assert "compute-sanitizer --tool racecheck" in calls and "speed.py --device cuda --model resnet56" in calls
    assert "output of python3" in (tmp_path / "out" / "log.txt").read_text()
    assert len(list((tmp_path / "out").iterdir())) + calls.count(f"json {tmp_path}") + calls.count("json=") <= 8


def test_the_gpu_script_ends_in_time(run_gpu_script):
    failed, summary, _ = run_gpu_script(GPU_SECONDS="0")
    assert failed == summary.count("skipped, no time left") == 10
