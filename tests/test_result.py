import pytest
import torch
from networks import PlainNet, images, randomised
from torch import nn

import singe
from singe.latency import Latency
from singe.plan import Plan
from singe.report import table
from singe.result import PruneResult, count_macs, count_parameters


def result(**changes):
    values = {
        "model": PlainNet(), "plan": Plan(), "params_before": 2000, "params_after": 500, "macs_before": 10_000,
        "macs_after": 4_000, "loss_before": 0.25, "loss_after": 0.5, "history": [],
        "frozen": {"head": "network output"},
    }  # fmt: skip
    return PruneResult(**{**values, **changes})


def test_shares_are_of_what_was_there_before():
    assert result().params_removed == 0.75
    assert result().macs_removed == pytest.approx(0.6)
    assert result(macs_before=0, macs_after=0).macs_removed == 0.0


def test_printing_shows_the_numbers_and_what_was_left_whole():
    lines = str(result()).splitlines()
    assert lines[2].split() == ["parameters", "2,000", "500", "-75.0%"]
    assert lines[3].split() == ["multiply-adds", "10,000", "4,000", "-60.0%"]
    assert lines[4].split() == ["loss", "0.2500", "0.5000"]
    assert lines[5:] == ["left whole: head (network output)"]


def test_latency_is_shown_where_it_was_measured():
    measured = result(latency_before=Latency(0.02, 0.019, 0.022, 9), latency_after=Latency(0.015, 0.014, 0.0161, 9))
    assert measured.latency_removed == pytest.approx(0.25)
    lines = str(measured).splitlines()
    assert lines[4].split() == ["latency", "20", "ms", "(19", "to", "22)", "15", "ms", "(14", "to", "16.1)", "-25.0%"]
    slower = result(latency_before=Latency(1, 1, 1, 9), latency_after=Latency(1.1, 1, 2, 9))
    assert "+10.0%" in str(slower)


def test_a_saved_result_loads(tmp_path):
    model = randomised(PlainNet())
    result(model=model).save(tmp_path)
    x = images()[0]
    assert torch.equal(singe.load(PlainNet().eval(), tmp_path)(x), model(x))


def test_parameters_count_once_however_often_they_are_used():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert count_parameters(model) == 12 + 12 + 6
    model[1].weight = model[0].weight
    assert count_parameters(model) == 12 + 3 + 6


def test_multiply_adds_are_counted_by_hand():
    model = randomised(PlainNet())
    x = images()[0]
    convolutions = 7 * 27 * 64 + 9 * 63 * 16 + 6 * 81 * 4
    assert count_macs(model, x[:1]) == convolutions + 6 * 11 + 11 * 4
    assert count_macs(model, x) == count_macs(model, x[:1])


def test_a_table_keeps_its_columns():
    text = table(["name", "n"], [["a", "1,000"], ["longer", "2"]])
    assert text.splitlines() == ["name        n", "------  -----", "a       1,000", "longer      2"]
    assert table(["a", "b"], []).splitlines() == ["a  b", "-  -"]
    assert table(["a", "b"], [["x", ""]]).splitlines()[-1] == "x"
