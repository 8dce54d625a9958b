"""Runs that several processes share; what each of them does is in ranked.py."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranked
import torch

HERE = Path(__file__).parent
ALL = [name for name in ranked.SCENARIOS if name not in ("checkpointed", "alone")]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(size, folder, *scenarios, **variables):
    """Starts processes as torchrun does, without what watches them; returns (exit code, output) of each."""
    shared = os.environ | {
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]), **variables,
    }  # fmt: skip
    command = [sys.executable, str(HERE / "ranked.py"), str(folder), *scenarios]
    started = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in range(size)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=240)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def told(size, folder, *scenarios, **variables):
    """What the scenarios returned on each rank."""
    for code, output in launch(size, folder, *scenarios, **variables):
        assert code == 0, output
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What each of three ranks does, scenario by scenario."""
    return told(3, tmp_path_factory.mktemp("three"), *ALL)


@pytest.fixture(scope="module")
def alone():
    """What one process does, of each scenario that was asked for."""
    found = {}

    def told(name):
        if name not in found:
            found[name] = json.loads(json.dumps(ranked.SCENARIOS[name](None)))
        return found[name]

    return told


def close(actual, expected, tolerance=1e-5):
    actual, expected = (torch.tensor(values, dtype=torch.float64) for values in (actual, expected))
    assert actual.shape == expected.shape
    return bool(((actual - expected).abs() <= tolerance * expected.abs().max().clamp(min=1e-30)).all())


def same_run(found, expected):
    assert found["removed"] == expected["removed"]
    for name in ("scores", "first"):
        assert all(close(*pair) for pair in zip(found[name], expected[name], strict=True))
    assert close(found["weights"], expected["weights"], 1e-4)


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith("by ")] + ["entwined", "user_forward"])
def test_scores_plan_and_training_come_to_what_one_process_comes_to(three, alone, name):
    for found in three:
        same_run(found[name], alone(name))
        assert found[name] == three[0][name]


def test_single_weights_are_masked_as_by_one_process(three, alone):
    assert all(found["single_weights"] == alone("single_weights") for found in three)
    assert all(close(found["tuned_weights"], alone("tuned_weights"), 1e-4) for found in three)


def test_batch_norms_and_masks_between_neurons_are_the_same_on_all_ranks(three):
    assert all(found["between_neurons"] == three[0]["between_neurons"] for found in three)


def test_loaders_that_are_divided_already_are_taken_as_they_are(three):
    results = [found["divided_by_the_user"] for found in three]
    assert all(r["result"] == results[0]["result"] and r["epoch"] == 5 for r in results)
    assert len({tuple(r["first"]) for r in results}) == len(three)


def test_the_first_rank_speaks_for_all(three):
    for rank, found in enumerate(three):
        seen = found["observed"]
        assert seen["kept"] and set(seen["evaluation"]) == {7.0}
        assert seen["records"] == (0 if rank else seen["groups"])
        assert seen["latency"] == three[0]["observed"]["latency"] and "median=0" not in seen["latency"].replace(
            "0.", "."
        )


def test_random_scores_are_the_first_ranks_whatever_others_have_drawn(three, alone):
    assert all(found["drawn_apart"] == alone("drawn_apart") for found in three)


def test_of_gradual_pruning_the_first_rank_decides_and_speaks(three, alone):
    expected = alone("gradual")
    assert expected["records"] == len(expected["removed"]) == 2
    for rank, found in enumerate(three):
        assert found["gradual"] == expected | {"records": 0 if rank else 2}


def test_widths_that_the_clock_decides_are_the_first_ranks(three):
    assert all(found["latency"] == three[0]["latency"] for found in three)


def test_the_first_ranks_weights_are_pruned(three, alone):
    for found in three:
        assert found["other_weights"]["kept"]
        same_run(found["other_weights"], alone("other_weights"))


def test_what_differs_between_ranks_is_refused_on_all_of_them(three):
    for found in three:
        arguments, model, samples, few, fine = found["others"]
        assert arguments.startswith("ValueError: expected the same arguments on all ranks, but ranks [1")
        assert model.startswith("ValueError: expected the same model on all ranks, but ranks [1")
        assert samples.startswith("ValueError: expected batches of one kind on all ranks, but those on ranks [1")
        assert few.startswith(f"ValueError: expected batches of a sample for each of {len(three)} ranks, got 1")
        assert fine == "none"


def test_a_rank_that_fails_ends_the_others_at_once(three):
    first, failed = (found["failing"] for found in three[:2])
    assert failed[0] == "ValueError: no more of this"
    assert first[0].startswith("RuntimeError: rank 0 of 3 has lost another rank")
    assert all(found["failing"][1] == "none" for found in three)


def test_a_rank_that_does_not_come_is_missed(tmp_path):
    first, _ = told(2, tmp_path, "alone")
    assert first["alone"].startswith(
        "RuntimeError: expected all 2 ranks to make this call, but not all came within 1 s"
    )


def test_a_run_that_ended_in_its_training_goes_on_from_the_first_ranks_epoch(three):
    assert all(found["ended_in_training"] == [18, 2, True] for found in three)


def test_a_killed_rank_ends_the_run_and_another_number_of_ranks_goes_on(tmp_path):
    calm = tmp_path / "calm"
    calm.mkdir()
    (undisturbed,) = told(1, calm, "checkpointed")
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = launch(3, folder, "checkpointed", KILL="3")
    assert killed[2][0] == -9
    for code, output in killed[:2]:
        assert code == 1 and "has lost another rank: it died" in output
    resumed = told(2, folder, "checkpointed")
    for found in resumed:
        same_run(found["checkpointed"], undisturbed["checkpointed"])
