import copy
import json
import pickle
import shutil

import pytest
import torch
from networks import PlainNet, images, randomised
from safetensors.torch import load_file, save_file
from torch import nn
from wiring import normal

import singe
from singe.graph.analysis import find_groups
from singe.graph.groups import Group, Slice
from singe.graph.trace import named_tensors, trace
from singe.removal.masks import put_on, zero_out
from singe.removal.plan import Plan
from singe.storage import files
from singe.storage.saved import load, load_plan, save, save_masked


@pytest.fixture(scope="module")
def pruned():
    model, plan = randomised(PlainNet()), Plan()
    for i, group in enumerate(find_groups(trace(model, images()[0]))[:-1]):
        plan.add(group, [i, group.size - 1])
    small = plan.apply(copy.deepcopy(model))
    with torch.no_grad():
        for p in small.parameters():
            p.add_(0.1)
    small.features[1].num_batches_tracked.fill_(17)
    return small, plan


@pytest.fixture
def saved(pruned, tmp_path):
    save(*pruned, tmp_path / "pruned")
    return tmp_path / "pruned"


def snapshot(model):
    return {n: (t, t.clone()) for n, t in named_tensors(model).items()}


def unchanged(model, before):
    now = named_tensors(model)
    return now.keys() == before.keys() and all(now[n] is t and torch.equal(t, v) for n, (t, v) in before.items())


def test_what_is_loaded_computes_the_same_to_the_bit(pruned, saved):
    small, plan = pruned
    fresh = randomised(PlainNet(), seed=5)
    before = snapshot(fresh)
    loaded = singe.load(fresh, saved)
    x = images()[0]
    assert torch.equal(loaded(x), small(x))
    assert all(torch.equal(t, small.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert loaded.features[0].out_channels == 5 and loaded.features[1].num_batches_tracked == 17
    assert unchanged(fresh, before) and fresh.features[0].out_channels == 7
    assert load_plan(saved).to_json() == plan.to_json()


def test_a_model_that_holds_no_values_is_refused(saved, masked):
    with torch.device("meta"):
        model = PlainNet()
    for directory in (saved, masked[1]):
        with pytest.raises(ValueError, match=r"got features\.0\.weight on 'meta'"):
            singe.load(model, directory)


def test_train_mode_and_requires_grad_are_those_of_the_model_given(saved):
    fresh = PlainNet()
    fresh.train().features.eval()
    fresh.features[0].weight.requires_grad_(False)
    loaded = load(fresh, saved)
    assert loaded.training and not loaded.features.training
    assert not loaded.features[0].weight.requires_grad and loaded.features[4].weight.requires_grad


def test_only_a_plan_and_weights_are_written(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "plan.json"]
    assert json.loads((saved / "plan.json").read_text())["format"] == "singe-plan"


def test_layouts_and_dtypes_survive(pruned, tmp_path):
    small, plan = pruned
    half = copy.deepcopy(small).to(torch.bfloat16, memory_format=torch.channels_last)
    save(half, plan, tmp_path)
    loaded = load(PlainNet().eval().to(torch.bfloat16), tmp_path)
    assert all(torch.equal(t, half.state_dict()[n]) for n, t in loaded.state_dict().items())
    with pytest.raises(ValueError, match=r"features\.0\.weight .*torch.float32, got .*torch.bfloat16"):
        load(PlainNet(), tmp_path)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight
        self.register_buffer("offset", normal(2))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu()) + self.offset


def test_tied_weights_and_buffers_survive(tmp_path):
    model, plan = Tied(), Plan()
    own = torch.arange(4)
    names = [("a.weight", 0), ("b.weight", 1), ("a.bias", 0), ("b.bias", 0), ("c.weight", 1)]
    plan.add(Group("a", 4, ("a.weight",), tuple(Slice(n, d, own, ("writes", "reads")[d]) for n, d in names), None), [1])
    small = plan.apply(copy.deepcopy(model))
    small.offset.mul_(3)
    save(small, plan, tmp_path)
    fresh = Tied()
    fresh.cache.fill_(5)
    loaded = load(fresh, tmp_path)
    assert loaded.a.weight is loaded.b.weight and loaded.a.weight.shape == (3, 3)
    assert torch.equal(loaded.offset, small.offset) and torch.equal(loaded.cache, torch.full((3,), 5.0))
    assert torch.equal(loaded(normal(5, 3)), small(normal(5, 3)))


def test_buffers_that_share_memory_are_saved(tmp_path):
    model = nn.Linear(3, 3)
    model.register_buffer("whole", normal(6))
    model.register_buffer("part", model.whole[:2])
    save(model, Plan(), tmp_path)
    loaded = load(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded.whole, model.whole) and torch.equal(loaded.part, model.part)


# what is refused


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def empty(path):
    (path / "model.safetensors").write_bytes(b"")


def foreign(path):
    save_file({"w": normal(3, 3)}, path / "model.safetensors")


def lacking(path):
    tensors = load_file(path / "model.safetensors")
    del tensors["features.0.bias"]
    save_file(tensors, path / "model.safetensors")


def unpruned(path):
    save_file(PlainNet().state_dict(), path / "model.safetensors")


def pickled(path):
    torch.save(PlainNet().state_dict(), path / "model.safetensors")


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("loading executed code",)


def bomb(path):
    for name in ("plan.json", "model.safetensors"):
        (path / name).write_bytes(pickle.dumps(Bomb()))


def half_a_plan(path):
    text = (path / "plan.json").read_text()
    (path / "plan.json").write_text(text[: len(text) // 2])


def binary_plan(path):
    (path / "plan.json").write_bytes(b"\xff\xfe\x00\x80")


def deep_plan(path):
    (path / "plan.json").write_text("[" * 100_000)


def wrong_plan(path):
    data = json.loads((path / "plan.json").read_text())
    data["removals"][0]["neurons"] = "all"
    (path / "plan.json").write_text(json.dumps(data))


def later_plan(path):
    data = json.loads((path / "plan.json").read_text())
    (path / "plan.json").write_text(json.dumps({**data, "version": 99}))


DAMAGES = {
    truncate: r"model\.safetensors", empty: r"model\.safetensors", foreign: r"unexpected \['w'\]",
    lacking: r"missing \['features.0.bias'\]", unpruned: "expected .* of shape", pickled: r"model\.safetensors",
    bomb: r"plan\.json", half_a_plan: r"plan\.json", binary_plan: r"plan\.json", deep_plan: r"plan\.json",
    wrong_plan: r"plan\.json", later_plan: "version 1, got version 99",
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=[d.__name__ for d in DAMAGES])
def test_a_damaged_file_is_named_and_refused(saved, damage, message):
    damage(saved)
    fresh = PlainNet()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=message):
        load(fresh, saved)
    assert unchanged(fresh, before)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name.replace(".", r"\.")):
        load(PlainNet(), saved)


@pytest.mark.parametrize("read", [lambda at: load(PlainNet(), at), load_plan])
def test_a_directory_that_holds_no_result_is_refused_with_what_was_expected_there(read, tmp_path):
    expected = r"expected what result\.save wrote in .*, plan\.json or masks\.safetensors beside model\.saf.*, got {}"
    with pytest.raises(FileNotFoundError, match=expected.format("neither")):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match=expected.format("no such directory")):
        read(tmp_path / "none")
    with pytest.raises(TypeError, match="a path for directory, got NoneType"):
        read(None)
    with pytest.raises(ValueError, match="a path for directory, got an empty string"):
        read("")


def test_another_architecture_is_refused(saved, pruned):
    with pytest.raises(ValueError, match=r"features\.0\.weight"):
        load(nn.Sequential(nn.Linear(3, 3)), saved)
    wider = PlainNet()
    wider.classifier[3] = nn.Linear(11, 5)
    with pytest.raises(ValueError, match=r"expected classifier\.3\.\w+ in .* of shape \(5"):
        load(wider, saved)


def test_the_pruned_model_itself_is_refused_as_the_unpruned_one(saved, pruned):
    small, _ = pruned
    before = snapshot(small)
    with pytest.raises(ValueError):
        load(small, saved)
    assert unchanged(small, before)


# writing


def test_a_write_that_fails_leaves_no_part_and_the_old_files_whole(saved, pruned, monkeypatch):
    small, plan = pruned
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    as_bytes, written = files.raw_bytes, []

    def fails(tensor):
        if written:
            raise OSError("no space left on device")
        written.append(tensor)
        return as_bytes(tensor)

    monkeypatch.setattr(files, "raw_bytes", fails)
    with pytest.raises(OSError, match="no space"):
        save(small, plan, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_saving_replaces_what_was_there(saved, pruned, tmp_path):
    small, plan = pruned
    other = copy.deepcopy(small)
    with torch.no_grad():
        other.classifier[3].bias.add_(1)
    save(other, plan, str(saved))
    assert torch.equal(load(PlainNet(), saved).classifier[3].bias, other.classifier[3].bias)
    moved = tmp_path / "moved"
    shutil.move(saved, moved)
    assert torch.equal(load(PlainNet(), str(moved)).classifier[3].bias, other.classifier[3].bias)


def test_saving_changes_nothing_in_the_model(pruned, tmp_path):
    small, plan = pruned
    before = snapshot(small)
    save(small, plan, tmp_path / "deep" / "er")
    assert unchanged(small, before)


def test_state_that_is_no_tensor_is_refused_by_name(tmp_path):
    class Scaled(nn.Linear):
        def get_extra_state(self):
            return 3.0

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match=r"0\._extra_state"):
        save(nn.Sequential(Scaled(2, 2)), Plan(), tmp_path)


# -- networks without some of their weights ----------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path):
    """A model with masks on, and where it is saved."""
    model = randomised(PlainNet())
    kept = {n: normal(*model.get_parameter(n).shape) > 0 for n in ("features.0.weight", "classifier.3.weight")}
    for name, mask in kept.items():
        zero_out(model.get_parameter(name), mask)
    save_masked(put_on(model, kept), kept, tmp_path / "sparse")
    return model, tmp_path / "sparse"


def test_weights_beside_masks_are_the_state_of_a_plain_network(masked):
    model, path = masked
    assert sorted(p.name for p in path.iterdir()) == ["masks.safetensors", "model.safetensors"]
    plain = PlainNet().eval()
    plain.load_state_dict(load_file(path / "model.safetensors"))
    x = images()[0]
    assert torch.equal(plain(x), model(x)) and torch.equal(load(PlainNet().eval(), path)(x), model(x))


def test_a_directory_holds_a_plan_or_masks(masked, pruned):
    model, path = masked
    save(*pruned, path)
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "plan.json"]
    assert load(PlainNet(), path).features[0].out_channels == 5
    save_masked(model, {}, path)
    assert sorted(p.name for p in path.iterdir()) == ["masks.safetensors", "model.safetensors"]


def test_masks_are_no_plan(masked):
    with pytest.raises(FileNotFoundError, match=r"expected plan\.json in .*, got masks\.safetensors"):
        load_plan(masked[1])


def other_masks(path):
    kept = load_file(path / "masks.safetensors")
    save_file({name: ~mask for name, mask in kept.items()}, path / "masks.safetensors")


def masks_of_nothing(path):
    save_file({"features.99.weight": torch.ones(3, dtype=torch.bool)}, path / "masks.safetensors")


def masks_of_numbers(path):
    kept = load_file(path / "masks.safetensors")
    save_file({name: mask.float() for name, mask in kept.items()}, path / "masks.safetensors")


def masks_cut_off(path):
    file = path / "masks.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_masks, "saved with other masks"),
        (masks_of_nothing, r"expected masks of the model's parameters .*features\.99\.weight"),
        (masks_of_numbers, "torch.bool, got .*torch.float32"),
        (masks_cut_off, "damaged file"),
        (truncate, "damaged file"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masked, damage, message):
    _, path = masked
    damage(path)
    fresh = PlainNet()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=message):
        load(fresh, path)
    assert unchanged(fresh, before)


def test_weights_that_another_tool_trained_on_get_their_zeros_back(masked):
    _, path = masked
    values = {name: value + 1 if value.is_floating_point() else value
              for name, value in load_file(path / "model.safetensors").items()}  # fmt: skip
    save_file(values, path / "model.safetensors")
    loaded, kept = load(PlainNet(), path), load_file(path / "masks.safetensors")
    for name, mask in kept.items():
        assert torch.equal(loaded.get_parameter(f"{name}_orig").detach() != 0, mask)


class Renaming(nn.Module):
    """Has a state_dict without the names of its modules, as of a network inside of another."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("passing", torch.ones(3), persistent=False)
        self.register_state_dict_post_hook(lambda module, state, *_: state.clear())

    def forward(self, x):
        return self.net(x) * self.passing


def test_what_hooks_make_of_the_state_dict_is_not_what_is_saved(tmp_path):
    torch.manual_seed(0)
    model, x = Renaming().eval(), torch.rand(5, 4)
    assert not model.state_dict()
    save(model, Plan(), tmp_path)
    loaded = load(Renaming().eval(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    assert "passing" not in load_file(tmp_path / "model.safetensors")


def test_a_dtype_that_no_file_holds_is_refused_before_anything_is_written(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"complex128 of phase"):
        save(model, Plan(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
