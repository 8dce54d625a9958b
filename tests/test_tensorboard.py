import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from singe.records import GroupRecord, RoundRecord, WeightRecord
from singe.tensorboard import TensorBoard

GROUP = GroupRecord("a", 4, (2, 0), (0.1, 0.2), 6, 1.0, 3.0, 2.0, 0.5, 0.0, 0.25, {}, (0.2, 0.7, 0.1, 0.9), (), 0.8)
WEIGHT = WeightRecord("w", 10, 4, 1.0, 3.0, 2.0, 0.5, 0.25)
ROUND = RoundRecord(21, {"a": (2, 0), "b": (1,)}, {"a": (0.1, 0.2), "b": (0.3,)}, 5, 1.0, 3.0, 0.5, 0.9, 0.8)


def written(directory):
    events = EventAccumulator(str(directory), size_guidance={"histograms": 0})
    events.Reload()
    return events


def scalars(events):
    return {name: [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_groups_are_written_as_they_come(tmp_path):
    with TensorBoard(tmp_path) as board:
        board(GROUP)
        first = scalars(written(tmp_path))  # before it is closed
        board(GROUP)
    assert first == {
        "loss/start": [(1, 1.0)], "loss/removed": [(1, 3.0)], "loss/end": [(1, 2.0)], "removed": [(1, 2)],
        "seconds/scoring": [(1, 0.5)], "seconds/compensating": [(1, 0.0)], "seconds/tuning": [(1, 0.25)],
        "evaluation": [(1, 0.8)],
    }  # fmt: skip
    events = written(tmp_path)
    assert scalars(events)["removed"] == [(1, 2), (2, 4)]
    assert [e.histogram_value.num for e in events.Histograms("scores")] == [4, 4]


def test_tensors_without_evaluation(tmp_path):
    board = TensorBoard(str(tmp_path / "deep" / "er"))
    board(WEIGHT)
    board.close()
    found = scalars(written(tmp_path / "deep" / "er"))
    assert found["removed"] == [(1, 4)] and found["loss/end"] == [(1, 2.0)] and "evaluation" not in found


def test_rounds_stand_at_their_epochs(tmp_path):
    with TensorBoard(tmp_path) as board:
        board(ROUND)
    found = scalars(written(tmp_path))
    assert found["removed"] == [(21, 5)] and found["seconds"] == [(21, 0.5)]
    assert (found["evaluation/start"], found["evaluation/removed"]) == ([(21, 0.9)], [(21, 0.8)])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'singe\[tensorboard\]'"):
        TensorBoard(tmp_path)
