"""Pruned networks on their way out: ONNX through both exporters, torch.export, torch.jit.trace."""

import contextlib
import io
import logging
import sys
import warnings

import onnx
import onnxruntime
import pytest
import torch
from beside import Beside
from networks import DenseNet, FlattenNet, MobileNet, PreActNet, ResNeXt, images, randomised
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from wiring import Attention, Wired, normal

import singe
from singe.models.numerics import alike, close

QUICK = {"images": 16, "finetune": None, "progress": False}
PLAIN = {"criterion": "magnitude", "allocation": "uniform", "compensate": "none"}


class Heads(nn.Module):
    """Attention over rows of pixels, whose heads can go, and a head on top."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = Attention(by_attribute=True, fused=True), nn.Linear(5, 4)

    def forward(self, x):
        x = x[:, 0, :7, :5]
        return self.head((x + self.attention(x)).mean(1))


def folded():
    return singe.fold_batchnorm(randomised(ResNeXt()), images(16)[0]).model


KINDS = {
    "residual": lambda: randomised(PreActNet()),
    "depthwise": lambda: randomised(MobileNet()),
    "grouped": lambda: randomised(ResNeXt()),
    "concatenated": lambda: randomised(DenseNet()),
    "heads": lambda: randomised(Heads()),
    "folded": folded,
}


OUTPUTS = [f"output_{number}" for number in range(len(KINDS))]


@pytest.fixture(scope="module")
def pruned():
    """A pruned network of each kind, side by side, and samples."""
    batch, networks = images(16), {}
    for kind, make in KINDS.items():
        model = make()
        result = singe.prune(model, [batch], 0.4, **PLAIN, **QUICK)
        assert result.params_removed > 0.3, kind
        if isinstance(model, Heads):
            assert result.model.attention.num_heads < model.attention.num_heads
        networks[kind] = result.model
    return Beside(networks).eval(), batch[0]


def answers(file, **inputs):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {value.name: torch.from_numpy(array) for value, array in zip(session.get_outputs(), found, strict=True)}


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@torch.no_grad()
def same_at_every_size(model, x, call):
    for count in (1, 2, 7):
        assert alike(call(x[:count]), model(x[:count])), count


# -- pruned networks of every kind --------------------------------------------------------------------------------


def all_answers(file):
    """Of the networks side by side, in order."""

    def call(x):
        found = answers(file, input=x)
        return tuple(found[name] for name in OUTPUTS)

    return call


def test_pruned_networks_answer_alike_in_onnx_runtime(pruned, tmp_path):
    model, x = pruned
    file = singe.export_onnx(model, x[:2], tmp_path / "new" / "net.onnx")
    onnx.checker.check_model(str(file), full_check=True)
    same_at_every_size(model, x, all_answers(file))


def test_so_they_do_through_the_older_exporter(pruned, tmp_path):
    model, x = pruned
    file = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x[:2],), file, dynamo=False, input_names=["input"], output_names=OUTPUTS,
            dynamic_axes={"input": {0: "batch"}},
        )  # fmt: skip
    same_at_every_size(model, x, all_answers(file))


def test_so_they_do_as_an_exported_program(pruned, tmp_path):
    model, x = pruned
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "net.pt2")
    same_at_every_size(model, x, torch.export.load(tmp_path / "net.pt2").module())


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_so_they_do_traced(pruned, tmp_path):
    model, x = pruned
    torch.jit.trace(model, x[:2]).save(tmp_path / "net.pt")
    same_at_every_size(model, x, torch.jit.load(tmp_path / "net.pt"))


# -- what export_onnx makes of a network --------------------------------------------------------------------------


def dicts():
    """A network on a dict with a label that it does not read; names that torch gives to values inside, too."""

    def wiring(self, batch):
        y = F.relu(self.a(batch["x"])) * batch["scale"]
        return {"relu": y.mean(1), "x": [y, y], "none": None, "parts": (y.sum(1), 3)}

    batch = {"x": normal(4, 5), "scale": normal(4, 6), "label": torch.arange(4)}
    return Wired(wiring, a=nn.Linear(5, 6)), batch, lambda model, batch: model(batch)


def test_inputs_and_outputs_are_named_by_the_keys_that_lead_to_them(tmp_path):
    model, batch, forward = dicts()
    file = singe.export_onnx(model, batch, tmp_path / "net.onnx", forward=forward)
    onnx.checker.check_model(str(file), full_check=True)
    graph = onnx.load(file).graph
    assert shapes(graph.input) == {"x": ["batch", 5], "scale": ["batch", 6]}
    assert shapes(graph.output) == {
        "relu": ["batch"], "x_0": ["batch", 6], "x_1": ["batch", 6], "parts_0": ["batch"],
    }  # fmt: skip
    found, expected = answers(file, x=batch["x"][:3], scale=batch["scale"][:3]), model(batch)
    assert close(found["relu"], expected["relu"][:3])
    assert close(found["x_1"], expected["x"][1][:3])
    assert close(found["parts_0"], expected["parts"][0][:3])


def test_an_output_of_the_name_of_an_input_is_told_from_it(tmp_path):
    model = Wired(lambda self, pair: {"x": self.a(pair["x"])}, a=nn.Linear(5, 4))
    file = singe.export_onnx(model, {"x": normal(3, 5)}, tmp_path / "net.onnx", forward=lambda m, batch: m(batch))
    assert [*shapes(onnx.load(file).graph.output)] == ["output_x"]


def test_one_sample_is_enough_for_a_dynamic_batch(tmp_path):
    model = Wired(lambda self, x: self.a(x).relu(), a=nn.Linear(5, 4))
    file = singe.export_onnx(model, normal(1, 5), tmp_path / "net.onnx")
    same_at_every_size(model, normal(7, 5), lambda x: answers(file, input=x)["output"])


def test_code_that_asks_for_the_length_of_a_batch_has_a_dynamic_one(tmp_path):
    model, x = randomised(FlattenNet()), images(7)[0]
    file = singe.export_onnx(model, x, tmp_path / "net.onnx")
    same_at_every_size(model, x, lambda x: answers(file, input=x)["output"])


def test_a_network_that_takes_one_number_of_samples_needs_a_fixed_batch(tmp_path):
    model, x = Wired(lambda self, x: self.a(x.view(3, 5)), a=nn.Linear(5, 4)), normal(3, 5)
    with pytest.raises(ValueError, match=r"any number of samples.*dynamic_batch=False.*Wired"):
        singe.export_onnx(model, x, tmp_path / "net.onnx")
    file = singe.export_onnx(model, x, tmp_path / "net.onnx", dynamic_batch=False)
    assert shapes(onnx.load(file).graph.input) == {"input": [3, 5]}
    assert close(answers(file, input=x)["output"], model(x).detach())


def test_the_opset_is_the_one_asked_for_or_refused(tmp_path):
    model, x = randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))), images()[0]
    file = singe.export_onnx(model, x, tmp_path / "net.onnx", opset=20)
    assert [(o.domain, o.version) for o in onnx.load(file).opset_import] == [("", 20)]
    with pytest.raises(ValueError, match="opset 7 has, got one that needs opset"):
        singe.export_onnx(model, x, tmp_path / "net.onnx", opset=7)


def test_weight_norms_become_plain_weights_and_masks_become_zeros(tmp_path):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 4)).eval()
    loader = [(normal(16, 5), torch.arange(16) % 4)]
    result = singe.prune(model, loader, 0.4, structured=False, **QUICK)
    file = singe.export_onnx(result.model, loader[0][0], tmp_path / "net.onnx")
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in onnx.load(file).graph.initializer}
    assert sum(w.size for w in weights.values()) == 5 * 6 + 6 + 6 * 4 + 4
    assert sum((w == 0).sum() for w in weights.values()) >= 0.4 * (5 * 6 + 6 * 4) - 1
    same_at_every_size(result.model, loader[0][0], lambda x: answers(file, input=x)["output"])


def test_the_model_is_exported_in_eval_mode_and_stays_as_it_is(tmp_path):
    model, (x, _) = randomised(MobileNet()).train(), images()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    level = logging.getLogger("torch.onnx").level
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("error")
        file = singe.export_onnx(model, x, tmp_path / "net.onnx")
    assert said.getvalue() == ""
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("torch.onnx").level == level
    assert close(answers(file, input=x)["output"], model.eval()(x).detach())


# -- what is refused ----------------------------------------------------------------------------------------------


def test_a_file_that_answers_something_else_is_not_written(tmp_path, monkeypatch):
    model, x = Wired(lambda self, x: self.a(x), a=nn.Linear(5, 4)), normal(3, 5)
    (file := tmp_path / "net.onnx").write_text("the one before")
    convert = torch.onnx.export

    def wrong(program, **options):
        program.state_dict["network.a.bias"] = nn.Parameter(program.state_dict["network.a.bias"] + 1)
        return convert(program, **options)

    monkeypatch.setattr(torch.onnx, "export", wrong)
    with pytest.raises(RuntimeError, match=r"ONNX Runtime.*3 samples output differs by"):
        singe.export_onnx(model, x, file)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["the one before"]


def test_without_onnx_runtime_it_says_that_nothing_is_compared(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    file = singe.export_onnx(Wired(lambda self, x: self.a(x), a=nn.Linear(5, 4)), normal(3, 5), tmp_path / "net.onnx")
    assert file.stat().st_size
    assert "not compared with the model: pip install onnxruntime" in caplog.text


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_what_is_missing_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"needs {missing}: pip install 'singe\[onnx\]'"):
        singe.export_onnx(nn.Linear(5, 4), normal(3, 5), tmp_path / "net.onnx")


REFUSED = {
    "an operator": (lambda self, x: torch.linalg.svdvals(self.a(x)), normal(3, 5, 5), {}, ValueError, "ONNX.*svd"),
    "code": (lambda self, x: self.a(x) if x.sum() > 0 else x, normal(3, 5), {}, ValueError, r"torch.export.*Wired"),
    "a dtype": (lambda self, x: self.a(x), normal(3, 5).bfloat16(), {}, ValueError, "Runtime can run on the CPU.*Gemm"),
    "inputs": (lambda self, x: self.a(x), [normal(3, 5)], {}, TypeError, "a tensor x, got list; of a batch"),
    "a shape": (lambda self, x: self.a(x), normal(3, 6), {}, ValueError, r"model\(x\) failed"),
    "opset": (lambda self, x: self.a(x), normal(3, 5), {"opset": 18.0}, TypeError, "int for opset"),
    "batch": (lambda self, x: self.a(x), normal(3, 5), {"dynamic_batch": 4}, TypeError, "dynamic_batch.*got 4"),
}


@pytest.mark.parametrize(("wiring", "x", "options", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_written_is_refused_and_nothing_is(tmp_path, wiring, x, options, kind, message):
    model = Wired(wiring, a=nn.Linear(5, 4)).to(getattr(x, "dtype", torch.float32))
    with pytest.raises(kind, match=message):
        singe.export_onnx(model, x, tmp_path / "net.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_may_keep_a_state_of_its_own_and_tied_weights_count_once(tmp_path, monkeypatch):
    class Own(Wired):
        def get_extra_state(self):
            return {"epoch": 3}

        def set_extra_state(self, state):
            pass

    model = Own(lambda self, x: self.b(self.a(x)), a=nn.Linear(5, 5), b=nn.Linear(5, 5))
    model.b.weight = model.a.weight
    monkeypatch.setattr(sys.modules["singe.storage.onnx"], "LARGEST", 140)
    assert singe.export_onnx(model, normal(3, 5), tmp_path / "net.onnx").exists()


def test_more_weights_than_a_file_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["singe.storage.onnx"], "LARGEST", 95)
    with pytest.raises(ValueError, match="at most 95 bytes of weights for one ONNX file, got 96"):
        singe.export_onnx(nn.Linear(5, 4), normal(3, 5), tmp_path / "net.onnx")
