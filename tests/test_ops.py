import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singe import ops, reference
from singe.memory import is_shortage

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


def shifted(tensor):
    """The same values, not aligned to 16 bytes."""
    values = torch.cat([tensor.new_zeros(1), tensor.flatten()])
    return values[1:].view(tensor.shape)


def laid_out(tensor, order):
    """The same values, dense, with the axes in that order in memory."""
    return tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(len(order))])


CHANNELS_LAST = [0, 2, 3, 1]


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
@pytest.mark.parametrize("change", [spread, shifted, lambda v: laid_out(v, [*range(1, v.dim()), 0])])
def test_fade_neurons_strides(device, dtype, change):
    case = fade_case(5, 3, 8, (4, 6), dtype, device)
    out = ops.fade_neurons(*[change(v) for v in case])
    torch.testing.assert_close(out, reference.fade_neurons(*case), rtol=0, atol=0)


@device_param
@dtype_param
@pytest.mark.parametrize("neurons", [1, 3, 8, 151])
def test_fade_neurons_keeps_channels_last(device, dtype, neurons):
    for spatial, layout in (((29, 31), torch.channels_last), ((3, 4, 5), torch.channels_last_3d)):
        z, *rest = fade_case(5, 3, neurons, spatial, dtype, device, rows=2)
        out = ops.fade_neurons(z.contiguous(memory_format=layout), *rest)
        assert out.is_contiguous(memory_format=layout)
        torch.testing.assert_close(out, reference.fade_neurons(z, *rest), rtol=0, atol=0)


@device_param
@pytest.mark.parametrize("order", [[0, 1, 2, 3], CHANNELS_LAST, [0, 3, 1, 2]], ids=str)
@pytest.mark.parametrize("axis", [1, 2, 3, -1, -2, -3])
def test_fade_neurons_along_any_axis(device, axis, order):
    z, *rest = fade_case(5, 3, 4, (4, 4), torch.float32, device)
    out = ops.fade_neurons(laid_out(z, order), *rest, axis=axis)
    torch.testing.assert_close(out, reference.fade_neurons(z, *rest, axis=axis), rtol=0, atol=0)
    torch.testing.assert_close(out, ops.fade_neurons(z.movedim(axis, 1), *rest).movedim(1, axis), rtol=0, atol=0)


@device_param
def test_fade_neurons_keeps_its_input_and_scales_once(device):
    z = random(2, 4, 3, device=device)
    before = z.clone()
    neuron = torch.tensor([[2, 2, -1]], device=device)
    out = ops.fade_neurons(z, neuron, torch.tensor([0.5], dtype=torch.float64, device=device))
    torch.testing.assert_close(out[:, 2], z[:, 2] * 0.5)
    torch.testing.assert_close(z, before, rtol=0, atol=0)


@device_param
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fade_neurons_random_layout(device, data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    axis = data.draw(st.integers(1, len(sizes) - 1))
    z = random(*sizes, dtype=torch.float32, device=device)
    rows = data.draw(st.lists(st.integers(-1, sizes[axis] - 1), max_size=6))
    neuron = torch.tensor(rows, dtype=torch.int64, device=device)
    t = torch.rand(len(rows), dtype=torch.float64, device=device)
    order = data.draw(st.permutations(range(len(sizes))))
    out = ops.fade_neurons(laid_out(z, order), neuron, t, axis=axis)
    torch.testing.assert_close(out, reference.fade_neurons(z, neuron, t, axis=axis), rtol=0, atol=0)


# fade_next and remove_neurons


def next_case(dtype=torch.float32, device="cpu", *, jobs=6, rows=4, batch=3, shape=(5, 4, 6)):
    base = random(batch, *shape, dtype=dtype, device=device)
    contribution = random(rows, batch, *shape, dtype=dtype, device=device)
    index = torch.randint(-1, max(rows, 1), (jobs,), device=device)
    return base, contribution, index if rows else index.fill_(-1), torch.rand_like(index, dtype=torch.float64) * 2


def in_double(case):
    return [v.double() if v.is_floating_point() else v for v in case]


def check_next(case, relu=True, original=None):
    """Against the twin in float64, on `original` where the case is the same in another layout."""
    expected = reference.fade_next(*in_double(original or case), relu)
    close(ops.fade_next(*case, relu), expected, TOLERANCE[case[0].dtype])


def check_remove(case, original=None):
    base, contribution, index, _ = case
    expected, *rest = in_double(original or case)
    expected = expected.clone()
    reference.remove_neurons(expected, *rest[:2])
    ops.remove_neurons(base, contribution, index)
    close(base, expected, TOLERANCE[base.dtype])


@device_param
@dtype_param
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (5, 4, 8), (2, 3, 5, 2)])
def test_fade_next(device, dtype, relu, shape):
    case = next_case(dtype, device, shape=shape)
    check_next(case, relu)
    out = ops.fade_next(*case, relu)
    assert out.dtype == dtype and out.is_contiguous()


@device_param
@dtype_param
@pytest.mark.parametrize("shape", [(), (7,), (5, 4, 8), (2, 3, 5, 2)])
def test_remove_neurons(device, dtype, shape):
    check_remove(next_case(dtype, device, shape=shape))


@device_param
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("axis", ["jobs", "rows", "batch", "shape"])
def test_fade_next_and_remove_neurons_sizes(device, axis, size):
    sizes = {"jobs": 3, "rows": 5, "batch": 2, "shape": 4} | {axis: size}
    case = next_case(device=device, **(sizes | {"shape": (sizes["shape"], 3)}))
    check_next(case)
    check_remove(case)


@device_param
@dtype_param
def test_fade_next_and_remove_neurons_many_blocks(device, dtype):
    case = next_case(dtype, device, jobs=11, shape=(129, 151))
    case[2].copy_(torch.tensor([0, 0, 0, 1, -1, 1, 3, 3, -1, -1, 2]))
    check_next(case)
    check_remove(case)


@device_param
@dtype_param
@pytest.mark.parametrize("change", [shifted, lambda v: laid_out(v, [*range(1, v.dim()), 0])])
def test_fade_next_and_remove_neurons_strides(device, dtype, change):
    case = next_case(dtype, device)
    check_next([change(v) for v in case], original=case)
    check_next([spread(v) for v in case], original=case)
    check_remove([change(v) for v in case], original=case)
    check_remove([case[0].clone(), *(spread(v) for v in case[1:])], original=case)


@device_param
@dtype_param
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "contribution contiguous"])
def test_fade_next_and_remove_neurons_keep_channels_last(device, dtype, alike):
    base, contribution, *rest = original = next_case(dtype, device, shape=(9, 29, 31))
    base = laid_out(base, CHANNELS_LAST)
    contribution = laid_out(contribution, [0, 1, 3, 4, 2]) if alike else contribution
    assert ops.fade_next(base, contribution, *rest).is_contiguous(memory_format=torch.channels_last)
    check_next((base, contribution, *rest), original=original)
    check_remove((base, contribution, *rest), original=original)
    assert base.is_contiguous(memory_format=torch.channels_last)


@device_param
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fade_next_and_remove_neurons_random_layout(device, data):
    shape = data.draw(st.lists(st.integers(1, 9), max_size=4))
    base, contribution, *rest = original = next_case(
        torch.float64, device, jobs=data.draw(st.integers(0, 6)), rows=data.draw(st.integers(0, 4)),
        batch=data.draw(st.integers(1, 4)), shape=shape,
    )  # fmt: skip
    axes = range(base.dim() + 1)
    contribution = laid_out(contribution, data.draw(st.permutations(axes)))
    case = laid_out(base, data.draw(st.permutations(axes[:-1]))).clone(), contribution, *rest
    check_next(case, data.draw(st.booleans()), original)
    check_remove(case, original)


@device_param
@dtype_param
def test_fade_next_without_a_row_is_base(device, dtype):
    base, contribution, index, t = next_case(dtype, device, jobs=2)
    base[0, 0] = math.inf
    out = ops.fade_next(base, contribution, index.fill_(-1), t)
    torch.testing.assert_close(out, torch.cat([base, base]), rtol=0, atol=0)


@device_param
@dtype_param
@pytest.mark.parametrize("relu", [False, True])
def test_fade_next_propagates_nan(device, dtype, relu):
    base, contribution, index, t = next_case(dtype, device, jobs=4, shape=(37,))
    index.copy_(torch.tensor([0, 1, 1, -1]))
    base[1, 5] = contribution[1, 2, 36] = math.nan
    nan = ops.fade_next(base, contribution, index, t, relu).isnan().unflatten(0, (4, 3))
    assert nan.nonzero().tolist() == [[0, 1, 5], [1, 1, 5], [1, 2, 36], [2, 1, 5], [2, 2, 36], [3, 1, 5]]


@device_param
@dtype_param
def test_remove_neurons_propagates_nan(device, dtype):
    base, contribution, *_ = next_case(dtype, device, shape=(37,))
    base[1, 5] = contribution[1, 2, 36] = contribution[3, 0, 0] = math.nan
    ops.remove_neurons(base, contribution, torch.tensor([0, 1, -1], device=device))
    assert base.isnan().nonzero().tolist() == [[1, 5], [2, 36]]


@device_param
def test_fade_next_and_remove_neurons_keep_the_rest(device):
    case = next_case(device=device)
    before = [v.clone() for v in case]
    ops.fade_next(*case)
    assert all(map(torch.equal, case, before))
    ops.remove_neurons(*case[:3])
    assert all(map(torch.equal, case[1:], before[1:]))


@device_param
def test_remove_neurons_counts_repeated_rows_and_skips_none(device):
    base, contribution, *_ = next_case(torch.float64, device)
    expected = base - 2 * contribution[2] - contribution[0]
    ops.remove_neurons(base, contribution, torch.tensor([2, -1, 0, 2], device=device))
    close(base, expected, 1e-12)


@device_param
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048), (torch.bfloat16, 256)], ids=str)
def test_remove_neurons_rounds_once(device, dtype, large):
    base = torch.full((3, 5), large, dtype=dtype, device=device)
    contribution = torch.full((4, 3, 5), -0.5, dtype=dtype, device=device)
    ops.remove_neurons(base, contribution, torch.arange(4, device=device))
    assert (base == large + 2).all()


@device_param
@pytest.mark.parametrize("change", [spread, lambda v: v[:1].expand_as(v)])
def test_remove_neurons_refuses_gaps(device, change):
    base, contribution, index, _ = next_case(device=device)
    with pytest.raises(ValueError, match=r"base: expected no gaps .* got shape \[3, 5, 4, 6\] with strides"):
        ops.remove_neurons(change(base), contribution, index)


@device_param
def test_more_jobs_than_a_grid_has_rows(device):
    """A CUDA grid has 65535 of them, each for a few jobs."""
    jobs = 8 * 65535 + 3
    case = next_case(torch.float32, device, jobs=jobs, batch=1, shape=(1,))
    check_next(case)
    base, _, index, t = case
    neuron = index.clamp_max(0)
    torch.testing.assert_close(
        ops.fade_neurons(base, neuron, t), reference.fade_neurons(base, neuron, t), rtol=0, atol=0
    )


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
    shapes = {"channels": 9, "spatial": (19, 17)}
    kinds = [(37, True), (37, False), (65, True), (70, True)]
    cases = [norm_case(torch.float32, jobs=jobs, shared=shared, **shapes) for jobs, shared in kinds]
    expected = [native(*case) for case in cases]
    try:
        for count in (1, 2, 5, 16):
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


# all of them


def operators(device="cpu"):
    case, window = norm_case(torch.float32, device, padding=(1, 1))
    geometry = [list(window[name]) for name in ("kernel_size", "stride", "padding", "dilation")]
    scores = torch.zeros_like(case[4])
    return {
        "fade_neurons": (*fade_case(3, 2, 4, (5,), torch.float32, device), 1),
        "fade_next": (*next_case(device=device), True),
        "neuron_grad_norm": (*case, *geometry, 1, 2.0, scores),
        "remove_neurons": next_case(device=device)[:3],
    }


name_param = pytest.mark.parametrize("name", ["fade_neurons", "fade_next", "neuron_grad_norm", "remove_neurons"])


@device_param
@name_param
def test_opcheck(device, name):
    torch.library.opcheck(getattr(torch.ops.singe, name).default, operators(device)[name])


def test_what_is_written_to_is_no_longer_what_a_backward_pass_needs():
    base, contribution, index = next_case()[:3]
    case, window = norm_case(torch.float32, "cpu")
    scores = torch.zeros_like(case[4])
    writes = {
        base: lambda: ops.remove_neurons(base, contribution, index),
        scores: lambda: ops.neuron_grad_norm(*case, scores, **window),
    }
    for tensor, write in writes.items():
        factor = torch.ones(1, dtype=tensor.dtype, requires_grad=True)
        product = (factor * tensor).sum()
        write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_operators_compile_without_breaks():
    base, contribution, index, t = next_case()
    z, neuron, scale = fade_case(2, 2, 3, (4,), torch.float32, "cpu")

    def both(base, contribution, index, t, z, neuron, scale):
        return ops.fade_next(base, contribution, index, t, True), ops.fade_neurons(z, neuron, scale)

    arguments = base, contribution, index, t, z, neuron, scale
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for actual, expected in zip(compiled(*arguments), both(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_scores_need_a_place_for_every_neuron():
    case, window = norm_case(torch.float32, "cpu")
    with pytest.raises(ValueError, match="scores: expected a value for every neuron"):
        ops.neuron_grad_norm(*case, torch.zeros(1, dtype=torch.float64).expand(len(case[4])), **window)


def test_results_need_no_gradient():
    z, neuron, t = fade_case(2, 2, 3, (4,), torch.float32, "cpu")
    assert not ops.fade_neurons(z.requires_grad_(), neuron, t).requires_grad
    base, *rest = next_case()
    assert not ops.fade_next(base.requires_grad_(), *rest).requires_grad


@pytest.mark.parametrize("order", [[0, 1, 2, 3], CHANNELS_LAST], ids=str)
def test_results_can_be_written_to_with_gradients(order):
    base, *rest = next_case()
    for out in (ops.fade_next(laid_out(base, order), *rest), ops.fade_neurons(laid_out(base, order), *rest[1:])):
        residual = torch.zeros_like(out, requires_grad=True)
        out += residual
        out.sum().backward()
        assert (residual.grad == 1).all()


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


@pytest.mark.parametrize("axis", [0, 3, -3])
def test_fade_neurons_refuses_an_axis(axis):
    case = fade_case(3, 2, 4, (5,), torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"axis: expected 1 to 2 or -1 down to -2, got {axis}"):
        ops.fade_neurons(*case, axis=axis)


NEXT_MISTAKES = [
    (0, torch.zeros(3, 5, 4, 6).int(), TypeError, "base: expected float64"),
    (0, torch.zeros(()), ValueError, r"base: expected \[batch"),
    (
        1,
        torch.zeros(4, 3, 5, 4, 6).half(),
        TypeError,
        "contribution: expected torch.float32 on cpu as base, got torch.float16",
    ),
    (1, torch.zeros(3, 5, 4, 6), ValueError, r"contribution: expected shape \[C, 3, 5, 4, 6\], got \[3, 5, 4, 6\]"),
    (1, torch.zeros(()), ValueError, r"contribution: expected shape \[C, 3, 5, 4, 6\], got \[\]"),
    (2, torch.zeros(6), TypeError, "index: expected torch.int64"),
    (2, torch.zeros(6, 1).long(), ValueError, r"index: expected a vector, got shape \[6, 1\]"),
    (2, torch.tensor([0, 4, 1, 1, 1, 1]), ValueError, "index: expected rows from -1 to 3, got 0 to 4"),
    (2, torch.tensor([0, -2, 1, 1, 1, 1]), ValueError, "got -2 to 1"),
]


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        *NEXT_MISTAKES,
        (3, torch.zeros(6), TypeError, "t: expected torch.float64"),
        (3, torch.zeros(5).double(), ValueError, r"t: expected shape \[6\], got \[5\]"),
    ],
)
def test_fade_next_refuses(index, value, error, message):
    with pytest.raises(error, match=message):
        ops.fade_next(*replaced(next_case(), index, value))


@pytest.mark.parametrize(("index", "value", "error", "message"), NEXT_MISTAKES)
def test_remove_neurons_refuses(index, value, error, message):
    with pytest.raises(error, match=message):
        ops.remove_neurons(*replaced(next_case()[:3], index, value))


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


@name_param
def test_direct_calls_are_checked_too(name):
    """torch.ops.singe bypasses ops.py: a wrong vector must raise, not read astray."""
    arguments = operators()[name]
    for index in range(1, 3):
        with pytest.raises(RuntimeError, match="expected"):
            getattr(torch.ops.singe, name)(*replaced(arguments, index, torch.full((99,), 10**6)))


@name_param
def test_direct_calls_check_the_device_too(name):
    """What the dispatcher sends to a device may have tensors of another among it."""
    operator = getattr(torch.ops.singe, name).default
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    arguments = operators()[name]
    others = [i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)][1:]
    for index in others:
        with pytest.raises(RuntimeError, match="expected the device of the other tensors"):
            operator.redispatch(cpu, *replaced(arguments, index, arguments[index].to("meta")))


def test_direct_calls_check_the_layout_too():
    z, neuron, t, _ = operators()["fade_neurons"]
    for axis in (0, 3, -1):
        with pytest.raises(RuntimeError, match="axis: expected 1 to 2"):
            torch.ops.singe.fade_neurons(z, neuron, t, axis)
    base, *rest = operators()["remove_neurons"]
    with pytest.raises(RuntimeError, match="base: expected a contiguous tensor"):
        torch.ops.singe.remove_neurons(spread(base), *rest)


def test_what_there_is_no_room_for_is_a_shortage():
    base = torch.zeros(1).expand(1, 1 << 45)  # takes four bytes; an output of that size takes more than any address
    row, t = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="can't allocate memory for a tensor of 35184372088832 elements") as caught:
        ops.fade_next(base, base.expand(1, *base.shape), row, t)
    assert is_shortage(caught.value)
    with pytest.raises(RuntimeError) as caught:  # an input without gaps, which is not there at once
        torch.ops.singe.fade_neurons(base[:, None], row, t, 1)
    assert is_shortage(caught.value)
