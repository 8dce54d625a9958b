import os
import stat
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from wiring import normal

from singe.digest import digest
from singe.storage import files
from singe.storage.files import read_text, replace, tensor_file, write_tensors


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    replace(path, lambda part: part.write_text("old"))

    def fails(part):
        part.write_text("half")
        assert path.read_text() == "old"
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        replace(path, fails)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".a.txt.part").write_text("left behind by another process")
    replace(tmp_path / "a.txt", lambda part: part.write_text("new"))
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "new"


def test_contents_and_name_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace

    def synced(descriptor):
        done.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), rename(*paths)))
    replace(tmp_path / "a.txt", lambda part: part.write_text("new"))
    assert done == ["file", "rename", "directory"]


def test_long_texts_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_TEXT", 10)
    (tmp_path / "a").write_text("0123456789")
    (tmp_path / "b").write_text("0123456789+")
    assert read_text(tmp_path / "a") == "0123456789"
    with pytest.raises(ValueError, match="at most 10 bytes, got 11"):
        read_text(tmp_path / "b")


def state():
    return {"a": normal(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(3.0, dtype=torch.bfloat16)}


CHANGES = {
    "value": lambda t: t["a"].mul_(-1),
    "sign of zero": lambda t: t["b"].logical_not_(),
    "shape": lambda t: t.update(a=t["a"].view(3, 2)),
    "dtype": lambda t: t.update(b=t["b"].to(torch.uint8)),
    "name": lambda t: t.update(d=t.pop("c")),
    "one less": lambda t: t.pop("c"),
    "values swapped": lambda t: t.update(a=t["a"].flip(0)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_digest_tells_any_change(change):
    changed = state()
    change(changed)
    assert digest("text", state()) == digest("text", dict(reversed(state().items())))
    assert len({digest("text", state()), digest("text", changed), digest("texts", state())}) == 3


def test_a_digest_does_not_depend_on_the_layout_in_memory():
    x = normal(2, 3, 4, 4)
    assert digest("", {"x": x}) == digest("", {"x": x.contiguous(memory_format=torch.channels_last)})


def test_a_tensor_file_says_what_it_holds(tmp_path):
    path, values = tmp_path / "x.safetensors", state()
    write_tensors(path, values, {"key": "value"})
    into = {name: torch.zeros_like(t) for name, t in values.items()}
    with tensor_file(path) as file:
        assert file.names == {"a", "b", "c"} and file.metadata == {"key": "value"}
        assert file.digest("text") == digest("text", values)
        file.check(into)
        file.copy(into)
    assert all(torch.equal(into[name], t) for name, t in values.items())


@pytest.mark.parametrize("dtype", files._DTYPES, ids=str)
def test_every_dtype_and_layout_comes_back(tmp_path, dtype):
    values = torch.arange(48).view(2, 3, 2, 4).to(dtype)
    turned = values.contiguous(memory_format=torch.channels_last)
    write_tensors(tmp_path / "x", {"a": values, "b": turned, "c": values[0, 0, 0, 0], "d": values[:0]}, {"k": "v"})
    found = load_file(tmp_path / "x")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        "a": (dtype, values.shape), "b": (dtype, values.shape), "c": (dtype, ()), "d": (dtype, (0, 3, 2, 4))
    }  # fmt: skip
    for name in "ab":
        assert torch.equal(found[name].view(torch.uint8), values.view(torch.uint8))


def test_other_dtypes_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.complex128 of b"):
        write_tensors(tmp_path / "x", {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex128)}, {})


def test_tensors_are_written_one_at_a_time(tmp_path, monkeypatch):
    alive = weakref.WeakSet()
    as_bytes = files.raw_bytes

    def counted(tensor):
        copy = tensor.contiguous()
        alive.add(copy)
        assert len(alive) == 1
        return as_bytes(copy)

    monkeypatch.setattr(files, "raw_bytes", counted)
    turned = {str(i): normal(2, 3, 4, 4).contiguous(memory_format=torch.channels_last) for i in range(4)}
    write_tensors(tmp_path / "x", turned, {})
    assert all(torch.equal(t, turned[name]) for name, t in load_file(tmp_path / "x").items())


def test_tensors_that_share_memory_are_written_apart(tmp_path):
    whole = normal(6)
    write_tensors(tmp_path / "x", {"whole": whole, "part": whole[2:4], "turned": whole.view(2, 3).T}, {})
    found = load_file(tmp_path / "x")
    assert torch.equal(found["part"], whole[2:4]) and torch.equal(found["turned"], whole.view(2, 3).T)


UNFIT = {
    "missing": ({"a": torch.zeros(2, 3)}, r"unexpected \['b', 'c'\]"),
    "more": ({**state(), "d": torch.zeros(1)}, r"missing \['d'\]"),
    "shape": ({**state(), "a": torch.zeros(3, 2)}, r"a in .* of shape \(3, 2\), torch.float32, got \(2, 3\)"),
    "dtype": ({**state(), "a": torch.zeros(2, 3).double()}, "torch.float64, got .* torch.float32"),
}


@pytest.mark.parametrize(("expected", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_file_of_other_tensors_is_refused(tmp_path, expected, message):
    write_tensors(tmp_path / "x", state(), {})
    with tensor_file(tmp_path / "x") as file, pytest.raises(ValueError, match=message):
        file.check(expected)


def test_what_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / ".x.part").mkdir()
    with pytest.raises(OSError):
        write_tensors(tmp_path / "x", state(), {})
    assert not (tmp_path / "x").exists()


@given(st.binary(max_size=60))
def test_bytes_that_are_no_tensors_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "x"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged file"), tensor_file(path):
        pass
