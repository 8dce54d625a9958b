"""The paper's tables: runs are kept and not repeated, all methods get the same, tables say what was measured."""

import argparse
import copy
import json
from dataclasses import replace

import pytest
import reproduce
import torch
from measuring.common import spearman
from models import MODELS, Network, load
from paper import (
    figure2,
    imagenet,
    oracle,
    peers,
    recipe,
    table1,
    table2,
    table3,
    table6,
    tables,
    torch_pruning_peer,
)
from paper.methods import BEST, PAPER
from paper.recipe import cifar10_baseline
from paper.records import Records
from records import write_records
from safetensors.torch import save_file
from small_resnet import SmallResNet

import singe
from singe.sizes import count_parameters
from singe.training.finetune import Tuner


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """What goes by the name of ResNet-20 has one block in a stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet20", Network(SmallResNet))
        yield


@pytest.fixture(scope="module")
def folder(small_network, tmp_path_factory):
    """Few random images, and the weights of a network that has not learned a thing."""
    folder = write_records(tmp_path_factory.mktemp("cifar10"))
    torch.manual_seed(0)
    save_file(load("resnet20").state_dict(), folder / "resnet20.safetensors")
    return folder


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(recipe, "RECALIBRATION_IMAGES", 32)
    monkeypatch.setattr(torch_pruning_peer, "IMAGES", 40)


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


def test_another_way_to_train_is_a_run_of_its_own_in_a_column_of_its_own(run, tmp_path):
    arguments = ["peers", "--only", "random", "--rates", "0.5", "--steps", "2"]
    found = run(*arguments)
    for option, value in (("lr", 0.05), ("hints", 3.0)):
        before, found = found, run(*arguments, f"--{option}", str(value))
        assert found[:-1] == before and found[-1]["settings"][option] == value
        assert not any(option in record["settings"] for record in before)
    assert "| 2 steps | 2 steps, hints 3 | 2 steps, lr 0.05 |" in (tmp_path / "peers.md").read_text()


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
def test_torch_pruning_meets_the_share_and_leaves_the_streams_whole(baseline, importance, ranking):
    pytest.importorskip("torch_pruning")
    pruned = torch_pruning_peer.prune(baseline, importance, ranking, 0.9, seed=0)
    gone = 1 - count_parameters(pruned) / count_parameters(baseline.model)
    assert gone == pytest.approx(0.9, abs=0.01)  # the network is small
    assert [block.conv2.out_channels for block in pruned.blocks] == [16, 32, 64]
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


# -- the paper's tables -----------------------------------------------------------------------------------------


def test_table_1_has_all_criteria(run, tmp_path):
    found = run("table1", "--only", "L?", "gradient", "--rates", "0.6", "--steps", "0")
    assert [r["settings"]["method"] for r in found] == ["L1", "L2", "gradient"]
    assert "| resnet20 | *.conv2 | 60% | L1 | " in (tmp_path / "table1.md").read_text()
    names = {row.name for row in table1.rows(sized(table1))}
    assert names >= {"SG", "IG", "IG, layer path", "loss change", "random", "reconstruction"}


def test_table_2_entwines_and_folds(run, tmp_path, monkeypatch):
    monkeypatch.setattr(table2, "METHODS", {name: {"criterion": "magnitude"} for name in (PAPER, BEST)})
    only = ("--only", "integrated gradient, *layer", "integrated gradient, folded, after")
    found = run("table2", "--rates", "0.5", "--steps", "2", *only, "--precision", "bfloat16")
    told = [(r["settings"]["folded"], r["settings"]["when"], r["settings"]["steps"]) for r in found]
    assert told == [(False, "layer", 2), (True, "after", 0), (True, "after", 2), (True, "layer", 2)]
    assert found[1]["top1_recalibrated"] is None and "top1_pruned" not in found[0]
    assert "when='layer'" in found[0]["settings"]["finetune"]
    assert all(r["params_removed"] == pytest.approx(0.5, abs=0.01) for r in found)
    assert "precision='bfloat16'" in found[0]["settings"]["finetune"] and found[0]["tuned_in"] == "bfloat16"
    text = (tmp_path / "table2.md").read_text()
    assert "| integrated gradient | True | layer |" in text and "fine-tuned in bfloat16" in text


def test_a_row_that_was_killed_continues(run, tmp_path, monkeypatch):
    monkeypatch.setattr(table2, "METHODS", {name: {"criterion": "magnitude"} for name in (PAPER, BEST)})
    arguments = ("table2", "--rates", "0.5", "--steps", "12", "--only", "integrated gradient, layer")
    taken, train = [], Tuner.train_stage

    def killed(self, **options):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(train(self, **options))
        return taken[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tuner, "train_stage", killed)
        run(*arguments)
    (unfinished,) = (tmp_path / "table2.unfinished").iterdir()
    assert not Records(tmp_path / "table2.jsonl").all()
    (record,) = run(*arguments)
    assert record.pop("continued") and "seconds_pruning" not in record and not unfinished.parent.exists()
    (tmp_path / "table2.jsonl").unlink()
    (undisturbed,) = run(*arguments)
    assert undisturbed.pop("seconds_pruning") > 0 and undisturbed == record


def test_table_6_masks_single_weights_of_all_layers(run, tmp_path, monkeypatch):
    monkeypatch.setattr(table6, "CRITERIA", ("magnitude",))
    monkeypatch.setattr(table6, "IMAGES", 16)
    found = run("table6", "--rates", "0.8", "--steps", "0", "2")
    assert [(r["settings"]["steps"], r["settings"]["ignore"]) for r in found] == [(0, []), (2, [])]
    assert all(r["params_removed"] == pytest.approx(0.8, abs=0.02) and r["macs_removed"] == 0 for r in found)
    assert "top1_pruned" in found[0] and "top1_tuned" in found[1]
    assert run("table6", "--rates", "0.8", "--steps", "0", "2") == found
    assert "| resnet20 | 80% | magnitude |" in (tmp_path / "table6.md").read_text()


def test_what_diverges_is_a_finding(run, tmp_path, monkeypatch):
    def tune(*_):
        raise ValueError("expected a finite loss, got nan")

    names = {row.name for row in table3.rows(sized(table3))}
    assert names == {name + kind for name in (PAPER, BEST) for kind in ("", ", entwined")}
    monkeypatch.setattr(table3, "METHODS", {name: {"criterion": "magnitude"} for name in (PAPER, BEST)})
    monkeypatch.setattr(recipe.Baseline, "tune", tune)
    found = run("table3", "--rates", "0.5", "--steps", "1", "--only", "integrated gradient")
    assert found[1]["problem"] == "expected a finite loss, got nan" and "top1_tuned" not in found[1]
    assert "1 steps: expected a finite loss" in (tmp_path / "table3.md").read_text()


def sized(script):
    return argparse.Namespace(**vars(script.CPU), precision=None, lr=recipe.LR, hints=0.0)


def test_the_oracle_ranks_as_the_true_loss_changes_do(run, tmp_path, baseline, monkeypatch):
    monkeypatch.setattr(oracle, "HELD_OUT", 32)
    monkeypatch.setattr(oracle, "IMAGES", (16,))
    monkeypatch.setattr(oracle, "NODES", (1,))
    found = run("oracle", "--layers", "blocks.2.conv1", "--seeds", "0", "--only", "L2", "IG, 1*")
    truth, *others = found
    assert len(truth["scores"]) == 64 and [r["settings"]["criterion"] for r in others] == ["L2", "IG, 1 nodes"]
    model, ((x, y),) = baseline.model, baseline.held_out(32)
    removed = copy.deepcopy(model)
    with torch.no_grad():
        removed.blocks[2].bn1.weight[3] = removed.blocks[2].bn1.bias[3] = 0
        change = torch.nn.functional.cross_entropy(removed(x), y) - torch.nn.functional.cross_entropy(model(x), y)
    assert truth["scores"][3] == pytest.approx(float(change), abs=1e-5)
    halves = [singe.score(model, (x[at], y[at]), "blocks.2.conv1", criterion="loss_change").tolist()
              for at in (slice(16), slice(16, None))]  # fmt: skip
    assert truth["halves"] == pytest.approx(spearmanr(*halves))
    magnitude = singe.score(model, (x, y), "blocks.2.conv1", criterion="magnitude")
    expected = spearmanr(magnitude.tolist(), truth["scores"])
    assert others[0]["spearman"] == pytest.approx(expected)
    assert run("oracle", "--layers", "blocks.2.conv1", "--seeds", "0", "--only", "L2", "IG, 1*") == found
    page = (tmp_path / "oracle.md").read_text()
    assert "| L2 |" in page and f"| held-out images, two halves | {truth['halves']:.3f} |" in page


def spearmanr(a, b):
    """Of mean ranks, in plain Python."""

    def ranks(values):
        return torch.tensor([sum(v < w for v in values) + sum(v == w for v in values) / 2 for w in values])

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]).double())[0, 1])


def test_equal_values_share_their_rank():
    a, b = torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 2.0]), torch.tensor([3.0, 1.0, 1.0, 4.0, 5.0, 9.0])
    assert spearman(a, b) == pytest.approx(spearmanr(a.tolist(), b.tolist()))
    assert spearman(b, -b) == pytest.approx(-1)


def test_figure_2_has_the_gradients_norm_at_each_point(run, tmp_path, baseline, monkeypatch):
    monkeypatch.setattr(figure2, "POINTS", 2)
    monkeypatch.setattr(figure2, "IMAGES", 8)
    found = run("figure2", "--layers", "blocks.1.conv1")
    (record,) = found
    batch, folded = baseline.batches(0, recipe.SCORING).take(8), baseline.folded()
    for t, norms in zip(record["t"], record["norms"], strict=True):
        faded = copy.deepcopy(folded)
        conv = faded.blocks[1].conv1
        with torch.no_grad():
            conv.weight[5] *= t  # there is no bias: the batch norms have not learned yet
        loss = torch.nn.functional.cross_entropy(faded(batch[0]), batch[1])
        (gradient,) = torch.autograd.grad(loss, conv.weight)
        assert norms[5] == pytest.approx(float(gradient[5].norm()), rel=1e-3)
    assert record["t"] == [0.5, 1.0] and "| blocks.1.conv1 | 32 |" in (tmp_path / "figure2.md").read_text()
    pytest.importorskip("matplotlib")
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")


# -- ImageNet ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder as ImageNet's, with three classes of few random pictures."""
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (80, 60, 3), generator=generator, dtype=torch.uint8)
                image.fromarray(pixels.numpy()).save(folder / f"{number}.jpeg")
    return tmp_path / "images"


def test_imagenet_is_read_from_a_folder_and_its_networks_are_pruned(pictures, tmp_path):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    save_file(models.mobilenet_v2().state_dict(), tmp_path / "weights.safetensors")
    arguments = ["imagenet", "--model", "mobilenet_v2", "--weights", str(tmp_path / "weights.safetensors"), "--data",
                 str(pictures), "--batch-size", "4", "--results", str(tmp_path), "--rates", "0.1"]  # fmt: skip
    made = imagenet.baseline(reproduce.parse(arguments))
    assert made.ignore == ("features.*.conv.2",) and len(made.checksums["train"]) == 64
    assert [y.tolist() for _, y in made.held_out(3)] == [[0, 1, 2]]
    assert next(iter(made.held_out(3)))[0].shape == (3, 3, 224, 224)
    assert made.accuracy(made.model) in [n / 6 for n in range(7)]
    pruned = singe.prune(made.model, made.loader, 0.1, criterion="magnitude", finetune=None, ignore=made.ignore,
                         images=4, progress=False)  # fmt: skip
    assert pruned.params_removed == pytest.approx(0.1, abs=0.005)
    made.tune(pruned.model, singe.FineTune(steps=1), 0)
    assert made.recalibrated_top1(pruned.model, 0) in [n / 6 for n in range(7)]


@pytest.mark.parametrize(("script", "model"), [("imagenet", "resnet56"), ("peers", "resnet50")])
def test_networks_are_for_their_images(script, model, folder, capsys):
    with pytest.raises(SystemExit):
        reproduce.main([script, "--model", model, "--weights", "w", "--data", str(folder)])
    assert f"got '{model}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet20", "*.conv2"), ("resnet50", "*.conv3"), ("mobilenet_v2", "blocks.*.layers.2")]
)
def test_streams_are_left_whole_by_what_writes_them(name, expected):
    with torch.device("meta"):
        assert recipe.streams(load(name)) == (expected,) and recipe.streams(load("vgg16_bn")) == ()


# -- tables -----------------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_over_seeds_with_its_deviation():
    records = [{"settings": {"seed": s, "steps": n}, "top1": t} for s, n, t in
               [(0, 0, 0.1), (0, 5, 0.5), (1, 5, 0.7), (0, 5, 0.6)]]  # fmt: skip
    assert tables.share("top1", tables.Training(5))(records) == "65.00 ± 7.07"
    assert tables.share("top1", tables.Training(0))(records) == "10.00"
    assert tables.share("top1", tables.Training(7))(records) == "-"
