"""The paper's tables: runs are kept and not repeated, all methods get the same, tables say what was measured."""

import copy
import json
from dataclasses import replace

import pytest
import reproduce
import torch
from models import load
from paper import peers, tables, torch_pruning_peer
from paper.recipe import cifar10_baseline
from paper.records import Records
from records import write_records
from safetensors.torch import save_file

import singe
from singe.result import count_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Few random images, and the weights of a network that has not learned a thing."""
    folder = write_records(tmp_path_factory.mktemp("cifar10"))
    torch.manual_seed(0)
    save_file(load("resnet20").state_dict(), folder / "resnet20.safetensors")
    return folder


@pytest.fixture
def run(folder, tmp_path):
    """Calls reproduce.py; returns the lines of the records."""

    def call(*arguments):
        reproduce.main([*arguments, *common(folder), "--results", str(tmp_path)])
        return Records(tmp_path / f"{arguments[0]}.jsonl").all()

    return call


def common(folder):
    return ["--model", "resnet20", "--weights", str(folder / "resnet20.safetensors"), "--data", str(folder),
            "--batch-size", "32"]  # fmt: skip


@pytest.fixture(scope="module")
def baseline(folder):
    return cifar10_baseline(reproduce.parse(["peers", *common(folder)]))


# -- records ----------------------------------------------------------------------------------------------------


def test_records_are_found_by_all_of_their_settings(tmp_path):
    records = Records(tmp_path / "runs" / "a.jsonl")
    assert records.all() == [] and records.find({"rate": 0.5}) is None
    records.add({"rate": 0.5, "seed": 0}, {"top1": 0.1})
    records.add({"rate": 0.5, "seed": 1}, {"top1": 0.2})
    assert records.find({"seed": 1, "rate": 0.5})["top1"] == 0.2
    assert records.find({"rate": 0.5}) is None


@pytest.mark.parametrize("torn", ['{"settings": {"rate": 0.7', "\n\n", '{"settings"\n'])
def test_what_a_kill_cut_off_is_no_record_and_spoils_none(tmp_path, torn):
    path = tmp_path / "a.jsonl"
    records = Records(path)
    records.add({"rate": 0.5}, {})
    path.write_text(path.read_text() + torn)
    assert [r["settings"] for r in records.all()] == [{"rate": 0.5}]
    records.add({"rate": 0.6}, {})
    assert [r["settings"]["rate"] for r in records.all()] == [0.5, 0.6]


# -- runs -------------------------------------------------------------------------------------------------------


def test_a_run_measures_before_and_after_training_and_is_never_repeated(run, tmp_path, folder, monkeypatch, capsys):
    found = run("peers", "--only", "magnitude", "unpruned", "--rates", "0.5", "--steps", "0", "2")
    assert [(r["settings"]["method"], r["settings"]["steps"]) for r in found] == [
        ("unpruned", 0), ("unpruned", 2), ("magnitude", 0), ("magnitude", 2)
    ]  # fmt: skip
    for record in found:
        assert record["params_removed"] == pytest.approx(record["settings"]["rate"], abs=0.005)
        assert ("top1_tuned" in record) == (record["settings"]["steps"] == 2)
        assert {"top1_pruned", "top1_recalibrated", "macs_removed", "machine"} <= record.keys()
        assert len(record["checksums"]["train"]) == 64
    assert str(folder) not in json.dumps(found)

    monkeypatch.setattr(singe, "prune", None)
    assert run("peers", "--only", "magnitude", "unpruned", "--rates", "0.5", "--steps", "0", "2") == found
    text = (tmp_path / "peers.md").read_text()
    assert "| 50% | singe | magnitude |" in text and "| 2 steps |" in text and "Seeds 0;" in text


def test_more_steps_leave_the_runs_there_are(run):
    first = run("peers", "--only", "random", "--rates", "0.5", "--steps", "2")
    assert [r["settings"]["steps"] for r in first] == [0, 2]
    more = run("peers", "--only", "random", "--rates", "0.5", "--steps", "2", "3")
    assert more[:2] == first and [r["settings"]["steps"] for r in more] == [0, 2, 3]


def test_another_definition_of_a_method_is_another_run_and_the_table_has_the_last(run, tmp_path, monkeypatch):
    arguments = ["peers", "--only", "mine", "--rates", "0.5", "--steps", "0"]
    for criterion in ("magnitude", "random"):
        monkeypatch.setattr(peers, "METHODS", {"mine": {"criterion": criterion}})
        found = run(*arguments)
    assert [r["settings"]["arguments"] for r in found] == [{"criterion": "magnitude"}, {"criterion": "random"}]
    assert (tmp_path / "peers.md").read_text().count("| mine |") == 1


def test_all_methods_are_tuned_on_the_same_batches(baseline):
    class Listening:
        def __init__(self, loader):
            self.loader, self.seen = loader, []

        def __iter__(self):
            for x, y in self.loader:
                self.seen.append(x)
                yield x, y

    seen = []
    for seed, model in ((0, baseline.model), (0, load("resnet20")), (1, baseline.model)):
        loader = Listening(baseline.loader)
        replace(baseline, loader=loader).tune(copy.deepcopy(model), singe.FineTune(steps=3), seed)
        seen.append(torch.cat(loader.seen))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


def test_the_baseline_is_as_it_was(baseline, run):
    before = {name: value.clone() for name, value in baseline.model.state_dict().items()}
    trained = copy.deepcopy(baseline.model)
    baseline.tune(trained, singe.FineTune(steps=1), 0)
    baseline.recalibrated_top1(baseline.model, 0)
    assert all(torch.equal(value, before[name]) for name, value in baseline.model.state_dict().items())
    assert not torch.equal(trained.fc.weight, baseline.model.fc.weight)


# -- Torch-Pruning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", torch_pruning_peer.RANKINGS)
@pytest.mark.parametrize("importance", torch_pruning_peer.IMPORTANCES)
def test_torch_pruning_meets_the_share_and_leaves_the_streams_whole(baseline, importance, ranking, monkeypatch):
    pytest.importorskip("torch_pruning")
    monkeypatch.setattr(torch_pruning_peer, "IMAGES", 40)
    pruned = torch_pruning_peer.prune(baseline, importance, ranking, 0.9, seed=0)
    gone = 1 - count_parameters(pruned) / count_parameters(baseline.model)
    assert gone == pytest.approx(0.9, abs=0.005)
    assert [block.conv2.out_channels for block in pruned.blocks] == [16] * 3 + [32] * 3 + [64] * 3
    assert all(p.grad is None for p in pruned.parameters())
    kept = [block.conv1.out_channels / old.conv1.out_channels for block, old in
            zip(pruned.blocks, baseline.model.blocks, strict=True)]  # fmt: skip
    assert min(kept) > 0 and (ranking == "global" or max(kept) - min(kept) < 1 / 16)


def test_all_layers_lose_the_same_share_or_the_lowest_go_wherever_they_are():
    scores = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([0.5, 0.1, 0.4, 0.3, 0.2, 9.0])}
    lowest = [("b", 1), ("b", 4), ("b", 3), ("b", 2), ("b", 0), ("a", 1), ("a", 2)]
    assert torch_pruning_peer.ranked(scores, "global") == lowest
    even = torch_pruning_peer.ranked(scores, "uniform")
    assert even == [("a", 1), ("b", 1), ("b", 4), ("a", 2), ("b", 3), ("b", 2), ("b", 0)]


def test_the_hessian_reads_the_mean_square_of_every_samples_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).double()
    x, y = torch.randn(33, 4, dtype=torch.float64), torch.randint(3, (33,))
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for sample, label in zip(x, y, strict=True):
        loss = torch.nn.functional.cross_entropy(model(sample[None]), label[None])
        expected += torch.autograd.grad(loss, model[0].weight)[0].square() / 33
    torch_pruning_peer.with_gradients(model, "Hessian", x, y)
    torch.testing.assert_close(model[0].weight.grad, expected)


# -- tables -----------------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_over_seeds_with_its_deviation():
    records = [{"settings": {"seed": s, "steps": n}, "top1": t} for s, n, t in
               [(0, 0, 0.1), (0, 5, 0.5), (1, 5, 0.7), (0, 5, 0.6)]]  # fmt: skip
    assert tables.share("top1", 5)(records) == "65.00 ± 7.07"
    assert tables.share("top1", 0)(records) == "10.00"
    assert tables.share("top1", 7)(records) == "-"
