import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singe import ops, reference

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)
NORMS = [1.0, 2.0, math.inf]
SIZES = [0, 1, 129, 151]

device_param = pytest.mark.parametrize("device", DEVICES)
dtype_param = pytest.mark.parametrize("dtype", DTYPES, ids=str)
norm_param = pytest.mark.parametrize("p", NORMS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def close(out, ref, tolerance):
    assert out.shape == ref.shape
    error = (out.double() - ref.double()).norm() / ref.double().norm().clamp_min(1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"


def random(*shape, dtype=torch.float64, device="cpu"):
    return torch.randn(shape, dtype=torch.float64, device=device).to(dtype)


def spread(tensor):
    """The same values with gaps between all of them, and in the gaps what must not be read."""
    gap = torch.full_like(tensor, math.nan if tensor.is_floating_point() else 10**6)
    return torch.stack([tensor, gap], -1)[..., 0]


# fade_neurons


def fade_case(jobs, batch, neurons, spatial, dtype, device, rows=None):
    z = random(batch, neurons, *spatial, dtype=dtype, device=device)
    shape = (jobs,) if rows is None else (jobs, rows)
    neuron = torch.randint(-1, max(neurons, 1), shape, device=device)
    return z, neuron if neurons else neuron.fill_(-1), torch.rand(jobs, dtype=torch.float64, device=device) * 2


@device_param
@dtype_param
@pytest.mark.parametrize("rows", [None, 0, 1, 5])
@pytest.mark.parametrize("spatial", [(), (7,), (4, 8), (3, 5, 2)])
def test_fade_neurons(device, dtype, rows, spatial):
    case = fade_case(6, 3, 9, spatial, dtype, device, rows)
    out = ops.fade_neurons(*case)
    assert out.is_contiguous() and out.dtype == dtype
    torch.testing.assert_close(out, reference.fade_neurons(*case), rtol=0, atol=0)


@device_param
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["jobs", "batch", "neurons", "spatial"])
def test_fade_neurons_sizes(device, axis, size):
    sizes = {"jobs": 3, "batch": 2, "neurons": 5, "spatial": 4} | {axis: size}
    spatial = (sizes.pop("spatial"), 3)
    case = fade_case(**sizes, spatial=spatial, dtype=torch.float32, device=device)
    torch.testing.assert_close(ops.fade_neurons(*case), reference.fade_neurons(*case), rtol=0, atol=0)


@device_param
@dtype_param
def test_fade_neurons_strides(device, dtype):
    z, neuron, t = fade_case(5, 3, 8, (4, 6), dtype, device)
    expected = reference.fade_neurons(z, neuron, t)
    for other in (z.contiguous(memory_format=torch.channels_last), z.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(ops.fade_neurons(other, neuron, t), expected, rtol=0, atol=0)
    out = ops.fade_neurons(spread(z), spread(neuron), spread(t))
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    shifted = torch.cat([z.flatten()[:1], z.flatten()])[1:].view(z.shape)  # not aligned to 16 bytes
    torch.testing.assert_close(ops.fade_neurons(shifted, neuron, t), expected, rtol=0, atol=0)


@device_param
def test_fade_neurons_keeps_its_input_and_scales_once(device):
    z = random(2, 4, 3, device=device)
    before = z.clone()
    neuron = torch.tensor([[2, 2, -1]], device=device)
    out = ops.fade_neurons(z, neuron, torch.tensor([0.5], dtype=torch.float64, device=device))
    torch.testing.assert_close(out[:, 2], z[:, 2] * 0.5)
    torch.testing.assert_close(z, before, rtol=0, atol=0)


# neuron_grad_norm


def norm_case(
    dtype=torch.float64, device="cpu", *, jobs=7, batch=3, channels=4, neurons=6, spatial=(7, 6), kernel=(3, 3),
    stride=None, padding=None, dilation=None, groups=1, shared=True,
):  # fmt: skip
    rank = len(kernel)
    stride, padding, dilation = stride or [1] * rank, padding or [0] * rank, dilation or [1] * rank
    out = ops._output_size(spatial, list(kernel), list(stride), list(padding), list(dilation))
    x = random(batch if shared else jobs * batch, channels, *spatial, dtype=dtype, device=device)
    delta = random(jobs, batch, *out, dtype=dtype, device=device)
    neuron = torch.randint(0, max(neurons, 1), (jobs,), device=device)
    weights = (torch.rand(size, dtype=torch.float64, device=device) + 0.1 for size in (jobs, neurons))
    window = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (x, delta, neuron, *weights), window


def native(case, window, p=2.0, start=None):
    scores = torch.zeros_like(case[4]) if start is None else start.clone()
    ops.neuron_grad_norm(*case, scores, **window, p=p)
    return scores


def twin(case, window, p=2.0, start=None):
    """In float64, whatever the case's dtype."""
    x, delta, *rest = case
    scores = torch.zeros_like(case[4]) if start is None else start.clone()
    reference.neuron_grad_norm(x.double(), delta.double(), *rest, scores, **window, p=p)
    return scores


def check(case, window, p=2.0):
    start = torch.rand_like(case[4])
    close(native(case, window, p, start), twin(case, window, p, start), TOLERANCE[case[0].dtype])


GEOMETRIES = {
    "linear": {"spatial": (), "kernel": (), "channels": 151},
    "linear groups": {"spatial": (), "kernel": (), "channels": 12, "groups": 3},
    "1d": {"spatial": (29,), "kernel": (5,), "stride": (2,), "padding": (3,)},
    "1x1": {"kernel": (1, 1)},
    "1x1 stride": {"kernel": (1, 1), "stride": (2, 2)},
    "3x3": {"padding": (1, 1)},
    "3x3 stride": {"spatial": (9, 12), "stride": (2, 2), "padding": (1, 1)},
    "7x7 stride": {"spatial": (23, 22), "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3)},
    "asymmetric": {"spatial": (9, 11), "kernel": (1, 5), "stride": (3, 1), "padding": (0, 2), "dilation": (1, 2)},
    "dilated": {"spatial": (15, 14), "dilation": (3, 2), "padding": (3, 2)},
    "stride and dilation": {"spatial": (15, 14), "dilation": (2, 3), "stride": (4, 2), "padding": (1, 2)},
    "stride over kernel": {"spatial": (15, 14), "kernel": (2, 2), "stride": (5, 3)},
    "much padding": {"spatial": (2, 3), "padding": (4, 5)},
    "groups": {"channels": 6, "groups": 3, "padding": (1, 1)},
    "depthwise": {"channels": 6, "groups": 6, "padding": (1, 1)},
    "depthwise multiplier": {"channels": 3, "groups": 3, "padding": (1, 1)},
    "3d": {"spatial": (4, 5, 6), "kernel": (2, 3, 1), "stride": (2, 1, 1), "padding": (1, 0, 1)},
}
geometry_param = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


@device_param
@dtype_param
@geometry_param
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per job"])
def test_neuron_grad_norm(device, dtype, geometry, shared):
    check(*norm_case(dtype, device, shared=shared, **geometry))


@device_param
@norm_param
@dtype_param
def test_neuron_grad_norm_norms(device, dtype, p):
    check(*norm_case(dtype, device, padding=(1, 1)), p)


@device_param
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["jobs", "batch", "channels", "neurons", "spatial"])
@pytest.mark.parametrize("kernel", [(), (3,)], ids=["linear", "1d"])
def test_neuron_grad_norm_sizes(device, kernel, axis, size):
    sizes = {"jobs": 3, "batch": 2, "channels": 5, "neurons": 3, "spatial": 4} | {axis: size}
    if axis == "neurons" and size == 0:
        sizes["jobs"] = 0
    spatial = (sizes.pop("spatial"),) * len(kernel)
    check(*norm_case(torch.float32, device, spatial=spatial, kernel=kernel, padding=[1] * len(kernel), **sizes))


@device_param
@pytest.mark.parametrize("shared", [True, False])
def test_neuron_grad_norm_many_blocks(device, shared):
    """Long enough for several blocks of positions, several panels of jobs and every tile's remainder."""
    check(
        *norm_case(torch.float32, device, jobs=43, batch=5, channels=7, spatial=(33, 31), padding=(1, 1), shared=shared)
    )


@device_param
def test_neuron_grad_norm_repeated_and_skipped_neurons(device):
    case, window = norm_case(device=device, jobs=9, neurons=3)
    case[2].copy_(torch.tensor([0, 2, 2, -1, 0, 2, -1, 2, 0]))
    check(case, window)
    assert native(case, window)[1] == 0


@device_param
@dtype_param
@pytest.mark.parametrize("shared", [True, False])
def test_neuron_grad_norm_strides(device, dtype, shared):
    case, window = norm_case(dtype, device, channels=5, padding=(1, 1), shared=shared)
    expected = native(case, window)
    last = [v.contiguous(memory_format=torch.channels_last) for v in case[:2]]
    close(native((*last, *case[2:]), window), expected, 0)
    close(native([spread(v) for v in case], window), expected, 0)
    scores = spread(torch.zeros_like(expected))
    ops.neuron_grad_norm(*case, scores, **window)
    close(scores, expected, 0)


@device_param
def test_neuron_grad_norm_of_one_pixel_that_no_window_covers(device):
    case, window = norm_case(device=device, spatial=(1,), kernel=(1,), stride=(3,), padding=(1,), channels=3)
    check(case, window)


@device_param
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_neuron_grad_norm_random_geometry(device, data):
    rank = data.draw(st.integers(0, 3))
    axes = [
        [data.draw(st.integers(low, high)) for _ in range(rank)]
        for low, high in ((1, 9), (1, 4), (1, 4), (0, 3), (1, 3))
    ]
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    spatial, kernel, stride, padding, dilation = axes
    case, window = norm_case(
        device=device, spatial=spatial, kernel=kernel, stride=stride, padding=padding, dilation=dilation,
        jobs=data.draw(st.integers(1, 6)), batch=data.draw(st.integers(1, 3)), groups=groups,
        channels=groups * data.draw(st.integers(1, 3)), neurons=groups * data.draw(st.integers(1, 3)),
        shared=data.draw(st.booleans()),
    )  # fmt: skip
    if case[1].numel():
        check(case, window, data.draw(st.sampled_from(NORMS)))


@device_param
@norm_param
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("where", ["x", "delta"])
def test_neuron_grad_norm_propagates_nan(device, p, kernel, where):
    spatial = (7, 6) if kernel else ()
    case, window = norm_case(torch.float32, device, jobs=5, neurons=5, kernel=kernel, spatial=spatial, shared=False)
    case[2].copy_(torch.arange(5))
    x, delta = case[:2]
    (x[6:9] if where == "x" else delta[2])[1].flatten()[0] = math.nan  # job 2's
    scores = native(case, window, p)
    assert scores.isnan().tolist() == [False, False, True, False, False]


@device_param
@dtype_param
def test_neuron_grad_norm_is_deterministic(device, dtype):
    case, window = norm_case(dtype, device, jobs=37, batch=4, channels=9, spatial=(19, 17), padding=(1, 1))
    first = native(case, window)
    assert all(torch.equal(native(case, window), first) for _ in range(5))


def test_neuron_grad_norm_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    cases = [norm_case(torch.float32, jobs=37, channels=9, spatial=(19, 17), shared=shared) for shared in (True, False)]
    expected = [native(*case) for case in cases]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(native(*case), scores) for case, scores in zip(cases, expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_neuron_grad_norm_equals_autograd_of_the_whole_layer():
    """One job per row with the rows' own deltas is the layer's weight gradient."""
    layer = torch.nn.Conv2d(3, 5, 3, padding=1, bias=False, dtype=torch.float64)
    x, target = random(4, 3, 8, 8), random(4, 5, 8, 8)
    out = layer(x)
    loss = (out - target).tanh().square().mean()
    delta = torch.autograd.grad(loss, out, retain_graph=True)[0].transpose(0, 1)
    loss.backward()
    weight_norm = layer.weight.detach().flatten(1).norm(dim=1)
    scores = torch.zeros(5, dtype=torch.float64)
    ones = torch.ones(5, dtype=torch.float64)
    ops.neuron_grad_norm(x, delta, torch.arange(5), ones, weight_norm, scores, kernel_size=(3, 3), padding=(1, 1))
    close(scores, weight_norm * layer.weight.grad.flatten(1).norm(dim=1), 1e-12)


# path_scores


def path_case(nodes, neurons, size, dtype=torch.float64, device="cpu"):
    weights = (torch.rand(n, dtype=torch.float64, device=device) for n in (neurons, nodes))
    return (random(nodes, neurons, size, dtype=dtype, device=device), *weights)


@device_param
@dtype_param
@norm_param
def test_path_scores(device, dtype, p):
    case = path_case(4, 9, 1151, dtype, device)
    grad, *rest = case
    close(ops.path_scores(*case, p), reference.path_scores(grad, *rest, p), 1e-12)
    strided = grad.transpose(0, 2).contiguous().transpose(0, 2)
    close(ops.path_scores(strided, *rest, p), ops.path_scores(*case, p), 0)
    close(ops.path_scores(*[spread(v) for v in case], p), ops.path_scores(*case, p), 0)


@device_param
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_path_scores_sizes(device, axis, size):
    sizes = [3, 4, 5]
    sizes[axis] = size
    case = path_case(*sizes, torch.float32, device)
    close(ops.path_scores(*case), reference.path_scores(*case), 1e-12)


@device_param
@norm_param
@pytest.mark.parametrize("at", [0, 17, 599])
def test_path_scores_propagates_nan(device, p, at):
    grad, *rest = path_case(2, 3, 600, torch.float32, device)
    grad[1, 1, at] = math.nan
    assert ops.path_scores(grad, *rest, p).isnan().tolist() == [False, True, False]


# all of them


def operators(device="cpu"):
    case, window = norm_case(torch.float32, device, padding=(1, 1))
    geometry = [list(window[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
    scores = torch.zeros_like(case[4])
    return {
        "fade_neurons": fade_case(3, 2, 4, (5,), torch.float32, device),
        "neuron_grad_norm": (*case, *geometry, 1, 2.0, scores),
        "path_scores": (*path_case(3, 4, 5, torch.float32, device), 2.0),
    }


@device_param
@pytest.mark.parametrize("name", ["fade_neurons", "neuron_grad_norm", "path_scores"])
def test_opcheck(device, name):
    torch.library.opcheck(getattr(torch.ops.singe, name).default, operators(device)[name])


def test_results_need_no_gradient():
    z, neuron, t = fade_case(2, 2, 3, (4,), torch.float32, "cpu")
    assert not ops.fade_neurons(z.requires_grad_(), neuron, t).requires_grad


def replaced(values, index, value):
    return [value if i == index else v for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(2, 4, 5).int(), TypeError, "z: expected float64"),
        (0, torch.zeros(5), ValueError, r"z: expected \[batch, neurons"),
        (1, torch.zeros(3), TypeError, "neuron: expected torch.int64"),
        (1, torch.zeros(3, 1, 1).long(), ValueError, r"neuron: expected \[K\]"),
        (1, torch.tensor([0, 4, 1]), ValueError, "neuron: expected rows from -1 to 3, got 0 to 4"),
        (1, torch.tensor([0, -2, 1]), ValueError, "got -2 to 1"),
        (2, torch.zeros(3), TypeError, "t: expected torch.float64"),
        (2, torch.zeros(2).double(), ValueError, r"t: expected shape \[3\], got \[2\]"),
    ],
)
def test_fade_neurons_refuses(index, value, error, message):
    case = fade_case(3, 2, 4, (5,), torch.float32, "cpu")
    with pytest.raises(error, match=message):
        ops.fade_neurons(*replaced(case, index, value))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 7, 6).int()}, TypeError, "x: expected float64"),
        ({"x": torch.zeros(3, 4, 7, 6).double()}, TypeError, "delta: expected torch.float64"),
        ({"x": torch.zeros(3, 4, 7)}, ValueError, "expected 4 axes"),
        ({"x": torch.zeros(4, 4, 7, 6)}, ValueError, "x: expected 3 or 21 rows, got 4"),
        ({"delta": torch.zeros(7, 3, 5, 5)}, ValueError, r"expected spatial sizes \[5, 4\], got \[5, 5\]"),
        ({"neuron": torch.full((7,), 6)}, ValueError, "neuron: expected rows from -1 to 5"),
        ({"neuron": torch.zeros(6).long()}, ValueError, r"neuron: expected shape \[7\]"),
        ({"node_weight": torch.zeros(7)}, TypeError, "node_weight: expected torch.float64"),
        ({"scores": torch.zeros(5).double()}, ValueError, r"scores: expected shape \[6\], got \[5\]"),
        ({"groups": 4}, ValueError, "groups: 4 does not divide 4 channels and 6 neurons"),
        ({"groups": 0}, ValueError, "groups: 0"),
        ({"p": 3.0}, ValueError, "p: expected 1, 2 or inf, got 3.0"),
        ({"stride": (1,)}, ValueError, "stride: expected 2 values of at least 1"),
        ({"stride": (0, 1)}, ValueError, "stride: expected 2 values of at least 1"),
        ({"padding": (-1, 1)}, ValueError, "padding: expected 2 values of at least 0"),
        ({"kernel_size": (1,) * 4}, ValueError, "kernel_size: expected at most 3"),
    ],
)
def test_neuron_grad_norm_refuses(changes, error, message):
    case, window = norm_case(torch.float32)
    names = ["x", "delta", "neuron", "node_weight", "weight_norm"]
    arguments = dict(zip(names, case, strict=True)) | window | {"scores": torch.zeros(6).double(), "p": 2.0}
    with pytest.raises(error, match=message):
        ops.neuron_grad_norm(**(arguments | changes))


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.zeros(3, 4, 5).long(), TypeError, "grad: expected float64"),
        (0, torch.zeros(3, 4), ValueError, r"grad: expected \[nodes"),
        (1, torch.zeros(3).double(), ValueError, r"weight_norm: expected shape \[4\], got \[3\]"),
        (2, torch.zeros(3), TypeError, "node_weight: expected torch.float64"),
        (3, 0.5, ValueError, "p: expected 1, 2 or inf, got 0.5"),
    ],
)
def test_path_scores_refuses(index, value, error, message):
    case = (*path_case(3, 4, 5), 2.0)
    with pytest.raises(error, match=message):
        ops.path_scores(*replaced(case, index, value))


@pytest.mark.parametrize("name", ["fade_neurons", "neuron_grad_norm", "path_scores"])
def test_direct_calls_are_checked_too(name):
    """torch.ops.singe bypasses ops.py: a wrong vector must raise, not read astray."""
    arguments = operators()[name]
    for index in range(1, 3):
        with pytest.raises(RuntimeError, match="expected"):
            getattr(torch.ops.singe, name)(*replaced(arguments, index, torch.full((99,), 10**6)))
