import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from reported import CURVES, KINDS, group, neurons, rounds
from safetensors.torch import save_file

from singe.report.facts import Facts, load, save


@pytest.fixture
def directory(tmp_path):
    """Holds a plan, which nobody reads here."""
    (tmp_path / "plan.json").write_text('{"format": "singe-plan"}')
    return tmp_path


@pytest.mark.parametrize("facts", KINDS.values(), ids=KINDS)
def test_what_is_saved_is_loaded(directory, facts):
    save(facts(), directory)
    assert load(str(directory)) == facts()
    assert sorted(p.name for p in directory.iterdir()) == ["plan.json", "report.json"]


def test_numbers_that_are_not_finite_are_no_number_in_the_file(directory):
    save(neurons(loss=(math.nan, math.inf), history=(group(loss_end=math.inf),)), directory)
    text = (directory / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == [None, None]
    facts = load(directory)
    assert all(map(math.isnan, (*facts.loss, facts.groups[0].loss_end)))


def test_records_come_in_their_kinds():
    assert [g.group for g in neurons().groups] == ["conv1", "conv2"] and neurons().rounds == neurons().tensors == []
    assert [r.epoch for r in rounds().rounds] == [21, 42] and rounds().groups == []


def test_a_directory_of_before_has_no_report(directory):
    with pytest.raises(FileNotFoundError, match=r"report\.json.*older versions"):
        load(directory)


def test_a_report_of_another_plan_is_refused(directory):
    save(neurons(), directory)
    (directory / "plan.json").write_text('{"format": "singe-plan", "version": 1}')
    with pytest.raises(ValueError, match="saved with others"):
        load(directory)


def test_a_report_of_other_masks_is_refused(directory):
    save_file({"w": torch.tensor([True, False])}, directory / "masks.safetensors")
    (directory / "plan.json").unlink()
    save(KINDS["weights"](), directory)
    load(directory)
    save_file({"w": torch.tensor([True, True])}, directory / "masks.safetensors")
    with pytest.raises(ValueError, match="saved with others"):
        load(directory)


def test_a_report_without_anything_beside_it_is_refused(directory):
    save(neurons(), directory)
    (directory / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        load(directory)


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("reading executed code",)


FILES = {
    "empty": b"", "binary": b"\xff\xfe\x00", "pickled": pickle.dumps(Bomb()), "deep": b"[" * 100_000,
    "a list": b"[]", "another file": b'{"format": "singe-plan"}', "cut off": b'{"format": "singe-report", "vers',
}  # fmt: skip


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_another_file_is_refused(directory, content):
    (directory / "report.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged report in .*report\.json"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 1, got version 2"),
        ({"version": None}, "version 1"),
        ({"model": ["Net"]}, "expected str at model"),
        ({"parameters": [1000]}, "expected 2 entries at parameters"),
        ({"parameters": [0, 0]}, "expected parameters, got none"),
        ({"parameters": [400, 1000]}, "no more parameters after"),
        ({"widths": {"conv1": [2, 4]}}, "no more widths of conv1 after"),
        ({"script": "alert(1)"}, "expected no 'script'"),
        ({"seconds": {"scoring": -1}}, "expected seconds"),
        ({"seconds": {"scoring": 1e999}}, "expected seconds"),
        ({"settings": {"rho": 0.5}}, r"expected str at settings\['rho'\]"),
        ({"history": "none"}, "expected list at history"),
    ],
)
def test_what_contradicts_itself_is_refused(directory, change, message):
    save(neurons(), directory)
    data = json.loads((directory / "report.json").read_text())
    (directory / "report.json").write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=message):
        load(directory)


LATENCY = neurons().latency


@pytest.mark.parametrize(
    "facts",
    [
        neurons(history=(group(removed=(2, 2)),)),
        neurons(history=(group(removed=(2, 4)),)),
        neurons(history=(group(scores=(0.1,)),)),
        neurons(history=(group(removed=(0, 1, 2, 3), scores=(0.0,) * 4),)),
        neurons(history=(group(first_scores=(0.1,)),)),
        neurons(history=(group(curves=(replace(CURVES[0], neuron=4),)),)),
        neurons(history=(group(curves=(replace(CURVES[0], t=(0.5, 2.0)),)),)),
        neurons(history=(group(curves=(replace(CURVES[0], norms=()),)),)),
        neurons(history=(group(), *rounds().history)),
        neurons(history=(replace(KINDS["weights"]().tensors[0], removed=101),)),
        rounds(history=(replace(rounds().rounds[0], scores={"a": (0.1,), "b": (0.3,)}),)),
        rounds(history=(replace(rounds().rounds[0], removed={"a": (2, 2), "b": (1,)}),)),
        neurons(latency=replace(LATENCY, after=replace(LATENCY.after, median=0.0))),
        neurons(latency=replace(LATENCY, after=replace(LATENCY.after, upper=math.nan))),
    ],
)
def test_records_that_contradict_themselves_are_refused(directory, facts: Facts):
    save(facts, directory)
    with pytest.raises(ValueError, match="damaged report"):
        load(directory)
