import json

import pytest
import torch
from networks import PlainNet, images, randomised

import singe
from singe.records import LatencyChange, WeightRecord
from singe.removal.plan import Plan, Removal
from singe.result import PruneResult, compared, spent
from singe.task import Task
from singe.timing.latency import Latency


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
    assert str(result(uncompensated={"fc": "too few"})).splitlines()[6:] == ["not refitted: fc (too few)"]


def test_results_and_plans_are_short_in_a_notebook():
    plan = Plan([Removal("a", 300, tuple(range(200)), ())])
    assert repr(plan) == "Plan(removals=[1 groups, 200 neurons])"
    assert repr(result(plan=plan)) == str(result(plan=plan))


def test_latency_is_shown_where_it_was_measured():
    faster = LatencyChange(Latency(0.02, 0.019, 0.022, 9), Latency(0.015, 0.014, 0.0161, 9), 8)
    assert faster.removed == pytest.approx(0.25)
    lines = str(result(latency=faster)).splitlines()
    assert " ".join(lines[4].split()) == "latency, batch of 8 20 ms (19 to 22) 15 ms (14 to 16.1) -25.0%"
    slower = LatencyChange(Latency(1, 1, 1, 9), Latency(1.1, 1, 2, 9), 1)
    assert slower.removed == pytest.approx(-0.1) and "+10.0%" in str(result(latency=slower))


def test_a_saved_result_loads(tmp_path):
    model = randomised(PlainNet())
    result(model=model).save(tmp_path)
    x = images()[0]
    assert torch.equal(singe.load(PlainNet().eval(), tmp_path)(x), model(x))


def test_what_is_saved_makes_a_report(tmp_path):
    full = result(model=randomised(PlainNet()), evaluation_before=0.9, widths={"a": (4, 2)}, seconds={"scoring": 1.5})
    full.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["model"] == "PlainNet"
    saved = singe.report.write_report(tmp_path, tmp_path / "saved")
    assert full.report(tmp_path / "direct").read_text() == saved.read_text()


def test_a_report_of_other_weights_than_those_beside_it_is_refused(tmp_path):
    result(model=randomised(PlainNet())).save(tmp_path)
    report = (tmp_path / "report.json").read_bytes()
    other = Plan([Removal("features.0", 7, (0,), ())])
    result(model=randomised(PlainNet()), plan=other).save(tmp_path)
    (tmp_path / "report.json").write_bytes(report)
    with pytest.raises(ValueError, match="saved with others"):
        singe.report.write_report(tmp_path)


def test_latencies_are_of_both_networks_and_leave_them_as_they_are():
    before, after = randomised(PlainNet()).train(), randomised(PlainNet())
    change = compared(before, after, images(3)[0], Task())
    assert change.samples == 3 and change.before.rounds == change.after.rounds > 0
    assert before.training and not after.training


def test_time_is_that_of_the_run_and_of_its_records():
    record = WeightRecord("w", 4, 1, 0.0, 0.0, 0.0, 1.5, 0.5)
    assert spent({"analysis": 2.0, "fine-tuning": 1.0, "ranking": 0.0}, [record, record]) == {
        "analysis": 2.0, "fine-tuning": 2.0, "scoring": 3.0,
    }  # fmt: skip
