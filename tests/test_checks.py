import math
import re

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from singe import checks
from singe.ops import FLOATING
from singe.task import Task

CPU = torch.device("cpu")
X, Y = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)


def test_the_device_is_that_of_the_parameters():
    assert checks.device_of(nn.Linear(2, 2)) == CPU
    assert checks.device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")


def test_a_model_must_have_parameters_on_one_device():
    with pytest.raises(ValueError, match="no parameters"):
        checks.device_of(nn.ReLU())
    with pytest.raises(ValueError, match="cpu, meta"):
        checks.device_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))


@pytest.mark.parametrize(
    ("name", "value"),
    [("0.weight", math.nan), ("0.weight", math.inf), ("1.bias", -math.inf), ("1.running_var", math.nan)],
)
def test_weights_and_statistics_that_are_not_finite_are_named(name, value):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    checks.finite_weights(model)
    model.state_dict()[name].view(-1)[-1] = value
    with pytest.raises(ValueError, match=name):
        checks.finite_weights(model)


def test_an_additive_mask_may_hold_minus_infinity():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    checks.finite_weights(model)


@pytest.mark.parametrize("change", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_tensors_that_are_not_strided_are_named_with_what_to_do(change):
    model = nn.Linear(2, 2)
    model.register_buffer("table", getattr(torch.eye(2), change)())
    layout = re.escape(str(model.table.layout))
    with pytest.raises(ValueError, match=rf"strided tensors, got table of layout {layout}; register its to_dense\(\)"):
        checks.sound_model(model)
    model.table = model.table.to_dense()
    checks.sound_model(model)


def test_a_sparse_parameter_is_named():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r"strided tensors, got weight of layout torch\.sparse_coo"):
        checks.sound_model(model)


def test_a_quantised_buffer_is_named():
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.quint8))
    with pytest.raises(ValueError, match=r"not quantised, got table of torch\.quint8"):
        checks.sound_model(model)


def test_tensors_of_other_classes_are_named():
    class Sharded(torch.Tensor):
        pass

    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).as_subclass(Sharded))
    with pytest.raises(ValueError, match="plain tensors, got weight of Sharded; a sharded model is gathered first"):
        checks.real_weights(model)


@pytest.mark.parametrize("pair", [(X, Y), [X, Y]])
def test_a_pair_of_tensors_is_a_batch(pair):
    x, y = checks.batch_of(pair, CPU, Task())
    assert x is X and y is Y


@pytest.mark.parametrize(
    ("item", "got"),
    [
        (X, "Tensor"),
        (None, "NoneType"),
        ({"x": X, "y": Y}, "dict"),
        ((X,), r"tuple of \(Tensor\)"),
        ((X, Y, Y), r"tuple of \(Tensor, Tensor, Tensor\)"),
        ([X, 3], r"list of \(Tensor, int\)"),
        ((X.numpy(), Y), r"tuple of \(ndarray, Tensor\)"),
    ],
)
def test_what_is_no_pair_of_tensors_is_described(item, got):
    with pytest.raises(TypeError, match=rf"\(x, y\).*{got}"):
        checks.batch_of(item, CPU, Task())


@pytest.mark.parametrize("pair", [(X, Y[:2]), (X[:0], Y[:0]), (torch.tensor(1.0), Y), (X, torch.tensor(1))])
def test_lengths_that_do_not_fit_are_shown(pair):
    with pytest.raises(ValueError, match=r"length.*\(.*\) .*\(.*\) "):
        checks.batch_of(pair, CPU, Task())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_finite_are_refused(value):
    x = X.clone()
    x[1, 1] = value
    with pytest.raises(ValueError, match="NaN"):
        checks.batch_of((x, Y), CPU, Task())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [*FLOATING, torch.complex64], ids=str)
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(dtype, value):
    x = torch.zeros(3, 4, 5, dtype=dtype)
    for view in (x, x.transpose(0, 2), x[:, ::2]):
        checks.finite_inputs(view)
        for at in range(view.numel()):
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), view.shape))
            view[index] = value
            with pytest.raises(ValueError, match="NaN"):
                checks.finite_inputs(view)
            view[index] = 0


@pytest.mark.parametrize("dtype", [*FLOATING, torch.int64, torch.uint16, torch.bool], ids=str)
def test_inputs_may_be_empty_and_of_any_dtype(dtype):
    checks.finite_inputs([torch.empty(3, 0, dtype=dtype), torch.ones(3, dtype=dtype), torch.tensor(1, dtype=dtype)])


def test_looking_at_a_batch_makes_no_tensor_of_its_size():
    x, made = torch.ones(1000), []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor))
            return result

    with Watching():
        checks.finite_inputs(x)
    assert made and max(made) <= 2


def test_integer_inputs_are_fine():
    assert checks.batch_of((Y, Y), CPU, Task())[0] is Y


@pytest.mark.parametrize(
    "x", [torch.ones(3, 5), torch.ones(3, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.int64)]
)
def test_batches_that_do_not_fit_the_model_are_shown_with_shape_dtype_and_torchs_own_words(x):
    with pytest.raises(ValueError, match="Linear") as caught:
        checks.runs(nn.Linear(2, 4), (x, Y), Task())
    message = str(caught.value)
    assert str(tuple(x.shape)) in message and str(x.dtype) in message and str(caught.value.__cause__) in message


def test_a_batch_that_fits_passes():
    checks.runs(nn.Linear(2, 4), (X, Y), Task())


WRONG = {
    "out_channels": lambda: nn.Conv2d(3, 4, 1),
    "in_channels": lambda: nn.ConvTranspose2d(4, 6, 1, groups=2),
    "in_features": lambda: nn.Linear(3, 4),
    "num_features": lambda: nn.BatchNorm1d(4, affine=False),
    "num_parameters": lambda: nn.PReLU(4),
}


@pytest.mark.parametrize(("attribute", "make"), WRONG.items(), ids=WRONG.keys())
def test_an_attribute_that_contradicts_its_tensor_is_named(attribute, make):
    model = nn.Sequential(make())
    checks.true_attributes(model)
    right = getattr(model[0], attribute)
    setattr(model[0], attribute, right + 1)
    with pytest.raises(ValueError, match=rf"expected 0.{attribute} to be {right}, as its tensors are, got {right + 1}"):
        checks.true_attributes(model)


def test_weights_that_are_computed_are_not_computed_to_look_at_them():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 2)).train()
    before = [buffer.clone() for buffer in model.buffers()]
    checks.sound_model(model)
    assert before and all(map(torch.equal, before, model.buffers()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch, about these tools
@pytest.mark.parametrize("kind", ["dynamic", "prepared", "converted"])
def test_a_quantised_model_is_named_and_refused(kind):
    quantisation = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(quantisation.QuantStub(), nn.Linear(4, 3), quantisation.DeQuantStub()).eval()
    checks.sound_model(model)  # these do nothing until they are converted
    if kind == "dynamic":
        model = quantisation.quantize_dynamic(model, {nn.Linear})
    else:
        model.qconfig = quantisation.get_default_qconfig("x86")
        model = quantisation.prepare(model)
        model = quantisation.convert(model) if kind == "converted" else model
    with pytest.raises(ValueError, match=r"expected a model that is not quantised, got .*prune first"):
        checks.sound_model(model)


@pytest.mark.parametrize("model, message", [
    (nn.Sequential(nn.LazyLinear(3)), r"got 0\.weight without values; run the model on a batch first"),
    (nn.Linear(2, 3, device="meta"), "got weight on 'meta'"),
])  # fmt: skip
def test_weights_that_are_not_there_are_named(model, message):
    with pytest.raises(ValueError, match=message):
        checks.sound_model(model)


def test_what_has_another_length_than_the_samples_is_named():
    task = Task(forward=lambda model, batch: model(batch["x"]))
    batch = {"x": torch.rand(16, 3), "targets": [{"boxes": torch.rand(2, 4)} for _ in range(16)]}
    with pytest.raises(ValueError, match=r"of one length.*\.\.\. with \(2, 4\) at \['targets'\]\[0\]\['boxes'\]") as e:
        checks.batch_of(batch, CPU, task)
    assert len(str(e.value)) < 500
