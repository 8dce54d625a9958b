"""The native operators against torch's own way to the same numbers: `pytest benchmarks/test_ops.py`."""

import pytest
import torch

from singe import ops

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

# jobs, images, channels, side, kernel
CONVOLUTIONS = [(64, 64, 16, 32, 3), (64, 64, 64, 8, 3), (64, 64, 64, 8, 1)]
LINEAR = [(64, 64, 512), (64, 64, 4096)]

# On the CPU, outputs of 16 MiB: malloc returns those over 32 MiB to the kernel, and getting fresh pages for the next
# one takes longer than any operator.
IMAGES = {"cpu": 16, "cuda": 64}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def measure(benchmark, device, f):
    """CUDA returns before it is done: wait for it."""

    def run():
        result = f()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    run()
    return benchmark(run)


def vectors(jobs, device):
    weights = torch.rand(2, jobs, dtype=torch.float64, device=device)
    return torch.arange(jobs, device=device), weights[0], weights[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["singe", "torch"])
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.benchmark(group="neuron_grad_norm conv")
def test_convolution(benchmark, device, way, shape):
    jobs, batch, channels, side, kernel = shape
    x = torch.randn(batch, channels, side, side, device=device)
    delta = torch.randn(jobs, batch, side, side, device=device)
    neuron, node_weight, weight_norm = vectors(jobs, device)
    window, padding = [kernel] * 2, [kernel // 2] * 2
    weight = torch.zeros(jobs, channels, *window, device=device)
    columns = delta.transpose(0, 1).contiguous()  # torch's layout, made outside of the measurement

    def singe():
        scores = torch.zeros_like(weight_norm)
        ops.neuron_grad_norm(x, delta, neuron, node_weight, weight_norm, scores, kernel_size=window, padding=padding)
        return scores

    def plain():
        arguments = ([1, 1], padding, [1, 1], False, [0, 0], 1, [False, True, False])
        grad = torch.ops.aten.convolution_backward(columns, x, weight, None, *arguments)[1]
        return node_weight * weight_norm * grad.flatten(1).norm(dim=1).double()

    torch.testing.assert_close(singe(), plain(), rtol=1e-4, atol=0)
    measure(benchmark, device, singe if way == "singe" else plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["singe", "torch"])
@pytest.mark.parametrize("shape", LINEAR, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.benchmark(group="neuron_grad_norm linear")
def test_linear(benchmark, device, way, shape):
    jobs, batch, channels = shape
    x, delta = torch.randn(batch, channels, device=device), torch.randn(jobs, batch, device=device)
    neuron, node_weight, weight_norm = vectors(jobs, device)

    def singe():
        scores = torch.zeros_like(weight_norm)
        ops.neuron_grad_norm(x, delta, neuron, node_weight, weight_norm, scores)
        return scores

    def plain():
        return node_weight * weight_norm * (delta @ x).norm(dim=1).double()

    torch.testing.assert_close(singe(), plain(), rtol=1e-4, atol=0)
    measure(benchmark, device, singe if way == "singe" else plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["singe", "torch"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.benchmark(group="fade_neurons")
def test_fade_neurons(benchmark, device, way, layout):
    z = torch.randn(IMAGES[device], 16, 32, 32, device=device).contiguous(memory_format=layout)
    neuron, t, _ = vectors(16, device)
    every, factor = torch.arange(len(t), device=device), t.float()[:, None, None, None]

    def plain():
        copies = z.expand(len(t), *z.shape).clone()
        copies[every, :, neuron] *= factor
        return copies.flatten(0, 1)

    def singe():
        return ops.fade_neurons(z, neuron, t)

    torch.testing.assert_close(singe(), plain(), rtol=0, atol=0)
    measure(benchmark, device, singe if way == "singe" else plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["singe", "torch"])
@pytest.mark.parametrize("jobs_per_row", [1, 4])
@pytest.mark.benchmark(group="fade_next")
def test_fade_next(benchmark, device, way, jobs_per_row):
    base = torch.randn(IMAGES[device], 16, 32, 32, device=device)
    contribution = torch.randn(16, *base.shape, device=device)
    neuron, t, _ = vectors(16, device)
    index, factor = neuron // jobs_per_row, (t - 1).float()[:, None, None, None, None]

    def plain():
        return torch.addcmul(base, factor, contribution[index]).relu_().flatten(0, 1)

    def singe():
        return ops.fade_next(base, contribution, index, t, relu=True)

    torch.testing.assert_close(singe(), plain(), rtol=1e-5, atol=1e-5)
    measure(benchmark, device, singe if way == "singe" else plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["singe", "torch"])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.benchmark(group="remove_neurons")
def test_remove_neurons(benchmark, device, way, rows):
    base = torch.randn(IMAGES[device], 16, 32, 32, device=device)
    contribution = torch.randn(16, *base.shape, device=device)
    index = torch.randperm(16, device=device)[:rows]

    def plain(out=base):
        return out.sub_(contribution[index].sum(0))

    def singe(out=base):
        ops.remove_neurons(out, contribution, index)
        return out

    torch.testing.assert_close(singe(base.clone()), plain(base.clone()), rtol=1e-5, atol=1e-5)
    measure(benchmark, device, singe if way == "singe" else plain)
