import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from singe.cli.models import fill, make


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_model_comes_from_a_factory_a_class_a_call_or_is_there_already(place):
    assert make("nets:tiny").layers[0].out_channels == make("nets:Tiny").layers[0].out_channels == 4
    assert make("nets:Tiny(width=3)").layers[0].out_channels == 3
    assert make("nets:shared") is make("nets:shared")


@pytest.mark.parametrize(
    "reference, message",
    [
        ("nets:number", r"expected a torch\.nn\.Module from nets:number, got int"),
        ("nets:broken", "nets:broken failed: RuntimeError: no such"),
        ("nets:some", "failed: TypeError.*not callable"),
    ],
)
def test_what_makes_no_model_is_refused(place, reference, message):
    with pytest.raises(ValueError, match=message):
        make(reference)


@pytest.mark.parametrize(
    "save",
    [
        lambda state: save_file(state, "w.safetensors"),
        lambda state: torch.save(state, "w.pt"),
        lambda state: torch.save({"epoch": 3, "state_dict": state}, "w.pth"),
        lambda state: torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, "w.ckpt"),
        lambda state: torch.save({f"_orig_mod.module.{k}": v for k, v in state.items()}, "w.pt"),
        lambda state: torch.save(
            {"ema": {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in state.items()}}, "w.pth"
        ),
    ],
)
def test_weights_are_read_from_what_people_save(place, save):
    trained, model = make("nets:tiny"), make("nets:tiny")
    save(values(trained))
    (file,) = place.glob("w.*")
    fill(model, file)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in values(trained).items())


def test_tied_weights_may_come_once(place):
    class Tied(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False))
            self[1].weight = self[0].weight

    trained, model = Tied(), Tied()
    save_model(trained, "w.safetensors")
    assert len(load_file("w.safetensors")) == 1
    fill(model, Path("w.safetensors"))
    assert torch.equal(model[0].weight, trained[0].weight) and model[1].weight is model[0].weight


def test_weights_of_another_model_are_refused_by_name_and_change_nothing(place):
    model = make("nets:tiny")
    before, state = values(model), values(make("nets:Tiny(5)"))
    del state["layers.6.bias"]
    torch.save(state | {"extra": torch.ones(1)}, "w.pt")
    with pytest.raises(ValueError, match=r"expected the weights of Tiny in w\.pt") as caught:
        fill(model, Path("w.pt"))
    said = str(caught.value)
    assert "missing: layers.6.bias" in said and "unknown: extra" in said
    assert "of another shape: layers.0.weight, layers.0.bias, layers.2.weight" in said
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_nothing_is_unpickled(place, capsys):
    with open("w.pt", "wb") as file:
        pickle.dump(Harmful(), file)
    torch.save({"state_dict": Harmful()}, "w.pth")
    torch.save(make("nets:tiny"), "whole.pt")
    for name in ("w.pt", "w.pth", "whole.pt"):
        with pytest.raises(ValueError, match="expected tensors only in"):
            fill(make("nets:tiny"), place / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights at all" * 9])
def test_files_that_hold_something_else_are_refused(place, name, content):
    (place / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected .* {name}|expected .*{name}"):
        fill(make("nets:tiny"), place / name)


def test_a_missing_file_and_a_state_of_other_things_are_refused(place):
    with pytest.raises(FileNotFoundError, match="found none at"):
        fill(make("nets:tiny"), place / "none.pt")
    torch.save({"epoch": 3, "net": {}}, "w.pt")
    with pytest.raises(ValueError, match=r"expected a state dict of tensors.*a dict with epoch, net"):
        fill(make("nets:tiny"), place / "w.pt")
