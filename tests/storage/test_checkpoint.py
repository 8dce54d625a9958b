import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from networks import MLP, PlainNet, images, randomised
from pruning import vectors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe import FineTune
from singe.graph.trace import named_tensors
from singe.storage.checkpoint import FILE, Checkpoint
from singe.storage.progress import NeuronProgress, WeightProgress
from singe.training import finetune

TUNINGS = {
    "none": None,
    "layer": FineTune(20, "layer", 0.02, hints=0.5),
    "neuron": FineTune(20, "neuron", 0.002, optimizer="adamw"),
    "after": FineTune(20, "after", 0.002, optimizer="adamw"),
}


def pictures():
    x, y = images(48)
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)


def prune(model, loader, directory, **options):
    plain = {"allocation": "uniform", "compensate": "none", "images": 16, "progress": False}
    options = {**plain, "finetune": TUNINGS["layer"], **options}
    return singe.prune(model, loader, options.pop("rho", 0.3), checkpoint=directory, **options)


def mlp(seed=0):
    return randomised(MLP(), seed)


class Killed(BaseException):
    pass


def killed_after(monkeypatch, writes):
    """Runs end when the checkpoint has been written so many times, at once or for the rest of the test."""
    write, left = Checkpoint.write, [writes]

    def counted(self, *args):
        write(self, *args)
        left[0] -= 1
        if not left[0]:
            raise Killed

    monkeypatch.setattr(Checkpoint, "write", counted)


def same_runs(a, b):
    tensors = [named_tensors(r.model) for r in (a, b)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(t, tensors[1][name]) for name, t in tensors[0].items())
    assert a.plan.to_json() == b.plan.to_json() and a.frozen == b.frozen
    for x, y in zip(a.history, b.history, strict=True):
        assert (x.group, x.removed, x.scores, x.neurons_scored) == (y.group, y.removed, y.scores, y.neurons_scored)
        assert (x.loss_start, x.loss_removed, x.loss_end) == (y.loss_start, y.loss_removed, y.loss_end)
    assert (a.loss_before, a.loss_after, a.macs_after) == (b.loss_before, b.loss_after, b.macs_after)


# going on


@pytest.mark.parametrize("finetune", TUNINGS.values(), ids=TUNINGS.keys())
def test_a_run_that_was_cut_off_comes_to_the_same(tmp_path, monkeypatch, finetune):
    undisturbed = prune(mlp(), vectors(), None, finetune=finetune)
    assert len(undisturbed.history) == 2
    for _ in range(3):  # before the first group, and behind each
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, 1)
            prune(mlp(), vectors(), tmp_path, finetune=finetune)
    same_runs(prune(mlp(), vectors(), tmp_path, finetune=finetune), undisturbed)


def test_training_after_all_groups_goes_on_from_any_epoch(tmp_path, monkeypatch):
    def run(directory):
        model = randomised(nn.Sequential(nn.Linear(10, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 4)))
        x, y = vectors(22).dataset.tensors
        loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
        return prune(model, loader, directory, finetune=FineTune(20), compensate="least_squares")

    def saved(directory):
        with safe_open(directory / FILE, "pt") as file:
            data = json.loads(file.metadata()["singe"])
        return data["tuned"], data["tuned_parts"]

    monkeypatch.setattr(finetune, "SHORTEST", 4)  # an epoch has 6 steps
    undisturbed = run(None)
    for number, expected in enumerate([(0, 0), (0, 0), (6, 1), (12, 2), (18, 3), (20, 4)]):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, 1)
            run(tmp_path)
        assert saved(tmp_path) == expected, number
    again = run(tmp_path)
    same_runs(again, undisturbed)
    assert again.seconds.keys() == undisturbed.seconds.keys()


WEIGHTS = {
    "layer": {"finetune": FineTune(20, "layer", 0.02)},
    "after, globally": {"finetune": FineTune(20, optimizer="adamw"), "allocation": "global", "recalibrate_bn": 32},
    "by gradients": {"finetune": None, "criterion": "integrated_gradient"},
}


@pytest.mark.parametrize("options", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_a_run_on_single_weights_goes_on_from_any_layer_and_epoch(tmp_path, monkeypatch, options):
    def run(directory):
        model = randomised(PlainNet())
        return singe.prune(
            model, pictures(), 0.6, structured=False, images=16, progress=False, checkpoint=directory, **options
        )

    monkeypatch.setattr(finetune, "SHORTEST", 5)
    undisturbed = run(None)
    epochs = 4 if options["finetune"] == WEIGHTS["after, globally"]["finetune"] else 0
    for _ in range(1 + len(undisturbed.history) + epochs):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, 1)
            run(tmp_path)
    again = run(tmp_path)
    assert list(again.masks) == list(undisturbed.masks) == [record.weight for record in again.history]
    assert all(torch.equal(mask, undisturbed.masks[name]) for name, mask in again.masks.items())
    state = undisturbed.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.model.state_dict().items())
    for a, b in zip(again.history, undisturbed.history, strict=True):
        assert (a.weight, a.removed, a.loss_end) == (b.weight, b.removed, b.loss_end)
    assert (again.loss_after, again.frozen) == (undisturbed.loss_after, undisturbed.frozen)


def test_a_run_on_weights_does_not_continue_one_on_neurons(tmp_path):
    prune(mlp(), vectors(), tmp_path, finetune=None, criterion="magnitude")
    with pytest.raises(ValueError, match="structured was true and is false"):
        singe.prune(mlp(), vectors(), 0.3, structured=False, finetune=None, progress=False, checkpoint=tmp_path)


def test_widths_that_were_chosen_by_the_clock_stay_and_are_not_measured_again(tmp_path, monkeypatch, measured):
    options = {"target": "latency", "rho": 0.5, "criterion": "magnitude"}
    undisturbed = prune(mlp(), vectors(), None, **options)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 1)  # before the first group
        prune(mlp(), vectors(), tmp_path, **options)
    measured.clear()
    again = prune(mlp(), vectors(), tmp_path, **options)
    assert measured == [2]  # only what came of it
    same_runs(again, undisturbed)
    assert again.latency == undisturbed.latency


EVERY, SOME = (1, 1, 1, 1, 1), (1, 2)
"""How often a checkpoint is written until a run is killed, run by run; the first time is before the first group."""

OPTIONS = {
    "recalibrated": ({"recalibrate_bn": 32}, SOME),
    "global": ({"allocation": "global", "target": "macs"}, SOME),
    "sensitivity": ({"allocation": "sensitivity", "criterion": "magnitude", "compensate": "mean"}, SOME),
    "compensated": (
        {"compensate": "least_squares", "compensation_images": 32, "criterion": "reconstruction"}, EVERY,
    ),
    "full": ({"refresh": "full", "criterion": "magnitude_gradient"}, SOME),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kills"), OPTIONS.values(), ids=OPTIONS.keys())
def test_a_convolutional_network_goes_on_from_any_group(tmp_path, monkeypatch, options, kills):
    def model():
        return randomised(PlainNet())

    undisturbed = prune(model(), pictures(), None, **options)
    assert len(undisturbed.history) > 1
    for writes in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_after(patch, writes)
            prune(model(), pictures(), tmp_path, **options)
    same_runs(prune(model(), pictures(), tmp_path, **options), undisturbed)


def test_a_run_that_had_ended_ends_again(tmp_path):
    first = prune(mlp(), vectors(), tmp_path)
    written = (tmp_path / FILE).stat().st_mtime_ns
    same_runs(prune(mlp(), vectors(), str(tmp_path)), first)
    assert (tmp_path / FILE).stat().st_mtime_ns == written
    assert os.listdir(tmp_path) == [FILE]


def test_callbacks_see_the_whole_run_whoever_watched_before(tmp_path):
    class Enough(Exception):
        pass

    def stop(record):
        raise Enough

    with pytest.raises(Enough):
        prune(mlp(), vectors(), tmp_path, callbacks=[stop])
    told = []
    result = prune(mlp(), vectors(), tmp_path, callbacks=[told.append], evaluate=lambda model: 0.5)
    assert told == result.history and len(told) > 1
    assert [r.evaluation for r in told] == [None, *[0.5] * (len(told) - 1)]
    same_runs(result, prune(mlp(), vectors(), None))
    assert [r.first_scores for r in told] == [r.first_scores for r in prune(mlp(), vectors(), tmp_path).history]


def test_a_graph_that_a_cut_broke_is_made_anew_of_the_same_widths(tmp_path, monkeypatch):
    class Split(nn.Module):
        """Its code asks for widths, which the graph holds."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, 12), nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x).relu()
            half = x.shape[1] // 2
            return self.c(self.b(x[:, :half] + x[:, half:]).relu())

    undisturbed = prune(randomised(Split()), vectors(), None)
    assert [r.group for r in undisturbed.history] == ["a", "b"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        prune(randomised(Split()), vectors(), tmp_path)
    same_runs(prune(randomised(Split()), vectors(), tmp_path), undisturbed)


def test_buffers_that_are_not_saved_with_the_model_are_in_the_checkpoint(tmp_path, monkeypatch):
    class Counting(MLP):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            if self.training:
                self.seen += 1
            return super().forward(x)

    undisturbed = prune(randomised(Counting()), vectors(), None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        prune(randomised(Counting()), vectors(), tmp_path)
    same_runs(prune(randomised(Counting()), vectors(), tmp_path), undisturbed)


SCRIPT = """
    import sys, time
    sys.path[:0] = {folders!r}
    from test_checkpoint import mlp, prune, vectors

    def wait(record):
        open(sys.argv[2], "w").close()
        time.sleep(600)

    prune(mlp(), vectors(), sys.argv[1], callbacks=[wait])
"""


def test_a_process_that_is_killed_leaves_what_another_goes_on_from(tmp_path):
    script, behind_a_group, directory = (tmp_path / name for name in ("run.py", "marker", "killed"))
    here = os.path.dirname(__file__)
    script.write_text(textwrap.dedent(SCRIPT.format(folders=[here, os.path.dirname(here)])))
    running = subprocess.Popen([sys.executable, script, directory, behind_a_group])
    while not behind_a_group.exists() and running.poll() is None:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "it was still at work"
    assert os.listdir(directory) == [FILE]
    same_runs(prune(mlp(), vectors(), directory), prune(mlp(), vectors(), None))


# what goes wrong on the way


def test_without_room_on_the_disk_a_run_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    write, written = Checkpoint.write, []

    def full(self, *args):
        written.append(len(written) != 1)
        with monkeypatch.context() as patch:
            if not written[-1]:
                patch.setattr(os, "fsync", fails)
            write(self, *args)

    def fails(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoint, "write", full)
    result = prune(mlp(), vectors(), tmp_path)
    assert written.count(True) == len(result.history), "once before all groups, and behind all but one"
    (message,) = [r.getMessage() for r in caplog.records if "no checkpoint was written" in r.getMessage()]
    assert "No space left" in message
    assert os.listdir(tmp_path) == [FILE]


def test_without_room_a_run_that_removes_nothing_ends_too(tmp_path, monkeypatch, caplog):
    write, before = Checkpoint.write, []

    def full(self, *args):
        if before:
            raise OSError(errno.ENOSPC, "No space left on device")
        before.append(write(self, *args))

    monkeypatch.setattr(Checkpoint, "write", full)
    result = prune(mlp(), vectors(), tmp_path, rho=1e-4, finetune=FineTune(2))
    assert not result.history
    assert "no checkpoint was written" in caplog.text


def test_a_directory_that_cannot_be_written_to_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(NotADirectoryError, match="expected a directory, got the file "):
        prune(mlp(), vectors(), tmp_path / "file")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        prune(mlp(), vectors(), tmp_path / "new")


class Torn(DataLoader):
    """Raises after a number of batches in all."""

    left = 0

    def __iter__(self):
        for batch in super().__iter__():
            if self.left == 0:
                raise OSError("the network drive is gone")
            self.left -= 1
            yield batch


def test_behind_a_loader_that_raises_the_run_goes_on(tmp_path):
    loader = Torn(vectors().dataset, batch_size=16, shuffle=True)
    loader.left = 10**6
    undisturbed = prune(mlp(), loader, None)
    taken = 10**6 - loader.left
    loader.left = taken * 2 // 3
    with pytest.raises(OSError, match="network drive"):
        prune(mlp(), loader, tmp_path)
    loader.left = 10**6
    same_runs(prune(mlp(), loader, tmp_path), undisturbed)


def test_a_loss_that_is_not_finite_leaves_the_last_good_group(tmp_path):
    calls = []

    def loss(outputs, batch):
        calls.append(1)
        value = nn.functional.cross_entropy(outputs, batch[1])
        return value * float("nan") if len(calls) > limit else value

    limit = 10**6
    undisturbed = prune(mlp(), vectors(), None, loss=loss)
    limit = len(calls) * 2 // 3
    calls.clear()
    with pytest.raises(ValueError, match="finite"):
        prune(mlp(), vectors(), tmp_path, loss=loss)
    limit = 10**6
    same_runs(prune(mlp(), vectors(), tmp_path, loss=loss), undisturbed)


def test_other_samples_than_before_are_told(tmp_path, caplog):
    first = prune(mlp(), vectors(), tmp_path)
    assert "first samples" not in caplog.text
    assert prune(mlp(), vectors(56), tmp_path).plan.to_json() == first.plan.to_json()
    assert "the loader's first samples, or its batches, are not what they were" in caplog.text


def test_so_are_batches_of_another_length(tmp_path, caplog):
    x, y = next(iter(vectors()))
    for size, told in ((8, 0), (8, 0), (4, 1)):
        prune(mlp(), list(zip(x.split(size), y.split(size), strict=True)), tmp_path, images=16)
        assert caplog.text.count("or its batches, are not what they were") == told


def test_batches_of_a_length_that_does_not_divide_the_samples_are_the_same_each_time(tmp_path, caplog):
    for _ in range(2):
        prune(mlp(), vectors(), tmp_path, images=40, compensate="least_squares", compensation_images=16)
    assert "are not what they were" not in caplog.text


# what is refused


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    prune(mlp(), vectors(), directory, finetune=TUNINGS["layer"])
    return (directory / FILE).read_bytes()


def another_weight():
    model = mlp()
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    return model


def one_frozen():
    model = mlp()
    next(model.parameters()).requires_grad_(False)
    return model


OTHERS = {
    "rho": ({"rho": 0.4}, mlp, "rho was 0.3 and is 0.4"),
    "seed": ({"seed": 1}, mlp, "seed was 0 and is 1"),
    "finetune": ({"finetune": None}, mlp, r"finetune was FineTune\(.* and is None"),
    "criterion": ({"criterion": "magnitude"}, mlp, r"criterion was IntegratedGradient.* and is Magnitude\(p=2\)"),
    "ignore": ({"ignore": ["*.0"]}, mlp, r'ignore was \[\] and is \["\*.0"\]'),
    "loss": (
        {"loss": nn.CrossEntropyLoss(), "forward": lambda m, b: m(b[0])},
        mlp,
        "loss was cross_entropy and is CrossEntropyLoss",
    ),
    "loss that has no name": (
        {"loss": lambda outputs, batch: outputs.square().mean()},
        mlp,
        "loss was cross_entropy and is .*lambda",
    ),
    "a field of finetune": (
        {"finetune": replace(TUNINGS["layer"], cooldown=0.5, precision="bfloat16")},
        mlp,
        "finetune was cooldown=0.3, precision=None and is cooldown=0.5, precision='bfloat16';",
    ),
    "weights": ({}, another_weight, "the model is another: its weights, .*modules; name"),
    "requires_grad": ({}, one_frozen, "the model is another: .*which of them are trained"),
}


@pytest.mark.parametrize(("options", "model", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_a_checkpoint_of_another_call_is_refused(tmp_path, written, options, model, message):
    (tmp_path / FILE).write_bytes(written)
    with pytest.raises(ValueError, match=rf"{FILE} to be of the same call, but .*{message}"):
        prune(model(), vectors(), tmp_path, **options)
    assert (tmp_path / FILE).read_bytes() == written


def test_a_run_goes_on_where_what_changed_does_not_decide_what_it_comes_to(tmp_path, written, caplog):
    (tmp_path / FILE).write_bytes(written)
    before = (tmp_path / FILE).stat().st_mtime_ns
    with caplog.at_level("INFO", "singe"):
        prune(mlp(), vectors(), tmp_path, memory=10**6, analysis_seconds=100)
    assert "the run continues after 2 of 2 groups" in caplog.text
    assert (tmp_path / FILE).stat().st_mtime_ns == before


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("reading executed code",)


def without_metadata(path):
    save_file(load_file(path), path)


def newer(path):
    with safe_open(path, "pt") as file:
        data = json.loads(file.metadata()["singe"])
    save_file(load_file(path), path, metadata={"singe": json.dumps({**data, "version": 3}), "digest": "0"})


def other_weights(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: t + 1 for name, t in load_file(path).items()}, path, metadata=metadata)


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "damaged file"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "damaged file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Bomb())), "damaged file"),
    "foreign": (without_metadata, "expected a checkpoint of singe.prune"),
    "newer": (newer, "version 2 .*, got version 3"),
    "other weights": (other_weights, "damaged checkpoint"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_named_and_refused(tmp_path, written, damage, message):
    path = tmp_path / FILE
    path.write_bytes(written)
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        prune(mlp(), vectors(), tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("place", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_one_flipped_bit_is_noticed_wherever_it_is(tmp_path, written, place):
    data = bytearray(written)
    data[int(place * len(data))] ^= 4
    (tmp_path / FILE).write_bytes(data)
    with pytest.raises(ValueError):
        prune(mlp(), vectors(), tmp_path)


@pytest.fixture(scope="module")
def progress():
    result = prune(mlp(), vectors(), None)
    widths = [(r.group, r.size, len(r.removed)) for r in result.history]
    return NeuronProgress(10, "abc", [*widths, ("more", 4, 2)], result.history, plan=result.plan, traced=1)


def test_progress_survives_json(progress):
    again = NeuronProgress.from_json(json.loads(json.dumps(progress.to_json())))
    assert again == progress and again.neurons == sum(len(r.removed) for r in progress.history) > 0


def test_progress_on_weights_survives_json_and_is_checked():
    result = singe.prune(mlp(), vectors(), 0.3, structured=False, finetune=None, images=16, progress=False)
    counts = [(record.weight, record.size, record.removed) for record in result.history]
    progress = WeightProgress(10, "abc", [*counts, ("more", 4, 2)], result.history)
    data = json.loads(json.dumps(progress.to_json()))
    assert WeightProgress.from_json(data) == progress
    data["counts"][0][2] += 1
    with pytest.raises(ValueError, match="damaged progress: what was removed"):
        WeightProgress.from_json(data)


CONTRADICTIONS = {
    "no number": lambda data: data.update(memory="much"),
    "nothing": lambda data: data.update(memory=0),
    "missing": lambda data: data.pop("traced"),
    "graph of the future": lambda data: data.update(traced=9),
    "kinds": lambda data: data.update(history=[1, 2]),
    "unknown field": lambda data: data["history"][0].update(more=1),
    "too many": lambda data: data["counts"][-1].__setitem__(2, 4),
    "other neurons": lambda data: data["history"][0]["removed"].reverse(),
    "other group": lambda data: data["plan"]["removals"][0].update(group="other"),
    "training too early": lambda data: data.update(tuned=20, tuned_parts=1),
    "training too early, in no parts": lambda data: data.update(tuned=20),
    "steps without a part": lambda data: (data["counts"].pop(), data.update(tuned=2)),
    "parts without a step": lambda data: (data["counts"].pop(), data.update(tuned=1, tuned_parts=2)),
    "more history": lambda data: data["plan"]["removals"].pop(),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_progress_that_contradicts_itself_is_refused(progress, change):
    data = json.loads(json.dumps(progress.to_json()))
    change(data)
    with pytest.raises(ValueError, match="damaged"):
        NeuronProgress.from_json(data)


def test_workers_that_persist_are_warned_about_where_a_run_may_continue(tmp_path, caplog):
    class Persistent(list):
        persistent_workers = True

    loader = Persistent(vectors())
    for directory, expected in ((None, 0), (tmp_path, 1)):
        caplog.clear()
        prune(mlp(), loader, directory, finetune=None)
        assert sum("workers persist" in message for message in caplog.messages) == expected


class Scaled(MLP):
    """With a parameter of no axes, whose momentum has none either."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.scale * super().forward(x)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_with_a_parameter_of_no_axes_goes_on(tmp_path, monkeypatch, optimizer):
    def run(directory):
        x, y = vectors().dataset.tensors
        loader = DataLoader(TensorDataset(x.double(), y), batch_size=8, shuffle=True)
        tuned = FineTune(20, "layer", 0.002, optimizer=optimizer)
        return prune(randomised(Scaled()).double(), loader, directory, finetune=tuned)

    undisturbed = run(None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 2)
        run(tmp_path)
    same_runs(run(tmp_path), undisturbed)


def test_the_order_of_rates_counts(tmp_path):
    first, second = (prune_by_rates(tmp_path, ("*", "layers.0")) for _ in range(2))
    assert first.plan.to_json() == second.plan.to_json()
    with pytest.raises(ValueError, match=r"allocation was .* and is"):
        prune_by_rates(tmp_path, ("layers.0", "*"))


def prune_by_rates(directory, order):
    return prune(mlp(), vectors(), directory, allocation={name: {"*": 1.0, "layers.0": 0.5}[name] for name in order})


def test_functions_without_a_name_are_told_by_what_they_compute(tmp_path):
    def by(loss):
        return prune(mlp(), vectors(), tmp_path, loss=loss)

    first = by(lambda outputs, batch: outputs.square().mean())
    assert by(lambda outputs, batch: outputs.square().mean()).plan.to_json() == first.plan.to_json()
    others = [
        lambda outputs, batch: outputs.abs().mean(),
        lambda outputs, batch: 2 * outputs.square().mean(),
        lambda outputs, batch: outputs.square().mean((0, 1)),
        lambda outputs, batch: sum(row.square().mean() for row in outputs),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"loss was .*<lambda> \w{8} and is .*<lambda> \w{8}"):
            by(other)
