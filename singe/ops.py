"""The Python face of the native operators (csrc/).

Each operator has a plain-torch twin of the same name and signature in `singe.reference`. Below, K counts
jobs (a neuron at a node of the path), B images, N neurons of the layer, C input channels, and *S stands for
the spatial axes. Vectors with a value per job or neuron are float64, rows of neurons are int64, and
everything else is float64, float32, float16 or bfloat16; the half types are computed in float32. Tensors may
have any strides.

Results carry no gradient. They keep the order of their input's axes in memory: channels last stays channels last.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import singe._C as _C
except ImportError as error:
    raise ImportError(
        "expected singe's native module, built for this Python and torch 2.11 or newer: run `pip install .` in the "
        f"source directory. The import into Python {platform.python_version()} with torch {torch.__version__} failed "
        f"with: {error}"
    ) from error

__all__ = ["build_info", "fade_neurons", "fade_next", "neuron_grad_norm", "remove_neurons"]

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_RANK = 3


def build_info() -> dict[str, str]:
    """How the native module was built: torch, compiler, cuda (empty without CUDA kernels), architectures."""
    info: dict[str, str] = _C.build_info()
    return info


@torch.no_grad()
def fade_neurons(z: Tensor, neuron: Tensor, t: Tensor, *, axis: int = 1) -> Tensor:
    """Copies of a layer's output, each with some neurons scaled: a node of the path for every job.

    Args:
        z: [B, N, *S], the output of a layer of N neurons; or with the neurons along another axis.
        neuron: int64 [K] or [K, R], the rows that copy k scales; -1 stands for none.
        t: float64 [K], what they are scaled by.
        axis: the axis of the neurons, any but the first; -1 for a linear layer's [B, T, N].

    Returns:
        [K*B, N, *S] in z's dtype; copy k is at rows k*B to (k+1)*B.
    """
    _check_floating("z", z)
    if z.dim() < 2:
        raise ValueError(f"z: expected [batch, neurons, ...], got shape {_shape(z)}")
    channels = axis + z.dim() if axis < 0 else axis
    if not 1 <= channels < z.dim():
        raise ValueError(f"axis: expected 1 to {z.dim() - 1} or -1 down to {1 - z.dim()}, got {axis}")
    if neuron.dim() not in (1, 2):
        raise ValueError(f"neuron: expected [K] or [K, R], got shape {_shape(neuron)}")
    _check_vector("t", t, torch.float64, neuron.size(0), z.device)
    _check_rows("neuron", neuron, z.size(channels), z.device)
    order = _memory_order(z, 1)
    faded: Tensor = torch.ops.singe.fade_neurons(z.permute(order), neuron, t, order.index(channels))
    return _restore(faded, order)


@torch.no_grad()
def fade_next(base: Tensor, contribution: Tensor, index: Tensor, t: Tensor, relu: bool = False) -> Tensor:
    """The output of the layer after the faded one, for every job, without running that layer.

    For job k, with activations in between that are positively homogeneous,

        out[k] = base + (t[k] - 1) * contribution[index[k]], and max(0, out[k]) with relu; NaN stays NaN.

    Args:
        base: [B, *S], the next layer's output with no neuron faded.
        contribution: [C, B, *S] in base's dtype, what each of C neurons adds to it; read without a copy where its
            axes are in memory as base's are.
        index: int64 [K], each job's row of contribution; -1 stands for base alone.
        t: float64 [K], what the jobs' neurons are scaled by.
        relu: whether a relu follows.

    Returns:
        [K*B, *S] in base's dtype; job k is at rows k*B to (k+1)*B.
    """
    _check_contribution(base, contribution, index)
    _check_vector("t", t, torch.float64, index.size(0), base.device)
    order = _memory_order(base, 1)
    faded: Tensor = torch.ops.singe.fade_next(base.permute(order), _permute_rows(contribution, order), index, t, relu)
    return _restore(faded, order)


@torch.no_grad()
def remove_neurons(base: Tensor, contribution: Tensor, index: Tensor) -> None:
    """Takes removed neurons out of the next layer's output, in place: base -= sum over r of contribution[index[r]].

    Args:
        base: [B, *S], the next layer's output, dense in memory with its axes in any order; changed.
        contribution: [C, B, *S] in base's dtype, what each of C neurons adds to it; read without a copy where its
            axes are in memory as base's are.
        index: int64 [R], the rows of contribution to take out; -1 stands for none, a row twice is taken out twice.
    """
    _check_contribution(base, contribution, index)
    order = _memory_order(base, 0)
    dense = base.permute(order)
    if not dense.is_contiguous():
        raise ValueError(f"base: expected no gaps in memory, got shape {_shape(base)} with strides {base.stride()}")
    torch.ops.singe.remove_neurons(dense, _permute_rows(contribution, order), index)
    _written(base)


@torch.no_grad()
def neuron_grad_norm(
    x: Tensor,
    delta: Tensor,
    neuron: Tensor,
    node_weight: Tensor,
    weight_norm: Tensor,
    scores: Tensor,
    *,
    kernel_size: Sequence[int] = (),
    stride: Sequence[int] | None = None,
    padding: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    p: float = 2.0,
) -> None:
    """Adds every job's norm of weight times norm of gradient to its neuron's score, in place.

    For job k, G[c, tap] = sum over b and o of delta[k, b, o] * x[b, c, o*stride + tap*dilation - padding],
    the gradient of the loss with respect to the weights of neuron[k], and

        scores[neuron[k]] += node_weight[k] * weight_norm[neuron[k]] * ||G||_p.

    G is never stored for more than a few jobs. The result does not depend on the number of threads. A NaN in
    x or delta reaches the scores of the jobs that see it; in x it may also do so from a position that no window reads.

    Args:
        x: the layer's input, [B, C, *S_in] for all jobs or [K*B, C, *S_in] with B rows for each.
        delta: [K, B, *S_out] in x's dtype, the loss's gradient at the output channel neuron[k].
        neuron: int64 [K], each job's row in the layer; -1 skips the job.
        node_weight: float64 [K], the quadrature's weights.
        weight_norm: float64 [N], the norms of the layer's rows.
        scores: float64 [N], added to.
        kernel_size: the convolution's window, one value per spatial axis, 0 to 3 of them; () for a linear layer.
        stride: likewise; ones by default.
        padding: likewise, zeros on both sides; zeros by default.
        dilation: likewise; ones by default.
        groups: the convolution's groups; G covers the channels of the group that neuron[k] belongs to.
        p: 1, 2 or math.inf.
    """
    rank = len(kernel_size)
    kernel_size = list(kernel_size)
    stride = [1] * rank if stride is None else list(stride)
    padding = [0] * rank if padding is None else list(padding)
    dilation = [1] * rank if dilation is None else list(dilation)
    _check_geometry(kernel_size, stride, padding, dilation)
    _check_floating("x", x)
    if delta.dtype != x.dtype or delta.device != x.device:
        raise TypeError(f"delta: expected {x.dtype} on {x.device} as x, got {delta.dtype} on {delta.device}")
    if x.dim() != rank + 2 or delta.dim() != rank + 2:
        raise ValueError(
            f"x, delta: expected {rank + 2} axes each for kernel_size {kernel_size}, "
            f"got shapes {_shape(x)} and {_shape(delta)}"
        )
    jobs, batch = delta.shape[:2]
    if x.size(0) not in (batch, jobs * batch):
        raise ValueError(f"x: expected {batch} or {jobs * batch} rows, got {x.size(0)}")
    expected = _output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    if list(delta.shape[2:]) != expected:
        raise ValueError(f"delta: expected spatial sizes {expected}, got {list(delta.shape[2:])}")
    neurons = weight_norm.numel()
    if groups < 1 or x.size(1) % groups or neurons % groups:
        raise ValueError(f"groups: {groups} does not divide {x.size(1)} channels and {neurons} neurons")
    _check_vector("neuron", neuron, torch.int64, jobs, x.device)
    _check_rows("neuron", neuron, neurons, x.device)
    _check_vector("node_weight", node_weight, torch.float64, jobs, x.device)
    _check_vector("weight_norm", weight_norm, torch.float64, neurons, x.device)
    _check_vector("scores", scores, torch.float64, neurons, x.device)
    _check_p(p)
    if neurons > 1 and not scores.stride(0):
        raise ValueError("scores: expected a value for every neuron, got one that is expanded over all of them")
    torch.ops.singe.neuron_grad_norm(
        x, delta, neuron, node_weight, weight_norm, kernel_size, stride, padding, dilation, groups, p, scores
    )
    _written(scores)


@torch.library.register_fake("singe::fade_neurons")
def _(z: Tensor, neuron: Tensor, t: Tensor, axis: int) -> Tensor:
    return z.new_empty((neuron.size(0) * z.size(0), *z.shape[1:]))


@torch.library.register_fake("singe::fade_next")
def _(base: Tensor, contribution: Tensor, index: Tensor, t: Tensor, relu: bool) -> Tensor:
    return base.new_empty((index.size(0) * base.size(0), *base.shape[1:]))


@torch.library.register_fake("singe::neuron_grad_norm")
def _(
    x: Tensor,
    delta: Tensor,
    neuron: Tensor,
    node_weight: Tensor,
    weight_norm: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    p: float,
    scores: Tensor,
) -> None:
    return None


@torch.library.register_fake("singe::remove_neurons")
def _(base: Tensor, contribution: Tensor, index: Tensor) -> None:
    return None


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _memory_order(tensor: Tensor, first: int) -> list[int]:
    """The axes as they are in memory, outermost first; those before `first` stay where they are."""
    return [*range(first), *sorted(range(first, tensor.dim()), key=tensor.stride, reverse=True)]


def _permute_rows(rows: Tensor, order: list[int]) -> Tensor:
    """Every row of [C, *S] with its axes in that order."""
    return rows.permute(0, *(axis + 1 for axis in order))


def _restore(result: Tensor, order: list[int]) -> Tensor:
    """Undoes permute(order); detached, since a view made without gradients can't be written to with them."""
    return result.permute([order.index(axis) for axis in range(len(order))]).detach()


def _written(tensor: Tensor) -> None:
    """Tells autograd that a tensor has changed, so that a backward pass through its old values is refused."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float64, float32, float16 or bfloat16, got {tensor.dtype}")


def _check_vector(name: str, v: Tensor, dtype: torch.dtype, length: int, device: torch.device) -> None:
    if v.dtype != dtype or v.device != device:
        raise TypeError(f"{name}: expected {dtype} on {device}, got {v.dtype} on {v.device}")
    if v.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {_shape(v)}")


def _check_rows(name: str, rows: Tensor, count: int, device: torch.device) -> None:
    """Rows' values are checked only on the CPU: reading them from a GPU would make it wait."""
    if rows.dtype != torch.int64 or rows.device != device:
        raise TypeError(f"{name}: expected torch.int64 on {device}, got {rows.dtype} on {rows.device}")
    if torch.compiler.is_compiling() or isinstance(rows, torch._subclasses.FakeTensor):
        return
    if rows.device.type == "cpu" and rows.numel():
        low, high = (int(bound) for bound in torch.aminmax(rows))
        if low < -1 or high >= count:
            raise ValueError(f"{name}: expected rows from -1 to {count - 1}, got {low} to {high}")


def _check_contribution(base: Tensor, contribution: Tensor, index: Tensor) -> None:
    _check_floating("base", base)
    if base.dim() < 1:
        raise ValueError("base: expected [batch, ...], got shape []")
    if contribution.dtype != base.dtype or contribution.device != base.device:
        raise TypeError(
            f"contribution: expected {base.dtype} on {base.device} as base, "
            f"got {contribution.dtype} on {contribution.device}"
        )
    if contribution.dim() < 1 or contribution.shape[1:] != base.shape:
        expected = ", ".join(map(str, ["C", *base.shape]))
        raise ValueError(f"contribution: expected shape [{expected}], got {_shape(contribution)}")
    if index.dim() != 1:
        raise ValueError(f"index: expected a vector, got shape {_shape(index)}")
    _check_rows("index", index, contribution.size(0), base.device)


def _check_p(p: float) -> None:
    if p not in (1, 2, math.inf):
        raise ValueError(f"p: expected 1, 2 or inf, got {p}")


def _check_geometry(kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> None:
    rank = len(kernel_size)
    if rank > MAX_RANK:
        raise ValueError(f"kernel_size: expected at most {MAX_RANK} values, got {kernel_size}")
    least = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    for (name, low), values in zip(least.items(), (kernel_size, stride, padding, dilation), strict=True):
        if len(values) != rank or any(value < low for value in values):
            raise ValueError(f"{name}: expected {rank} values of at least {low}, got {values}")


def _output_size(
    sizes: Sequence[int], kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    axes = zip(sizes, kernel_size, stride, padding, dilation, strict=True)
    return [max(0, (size + 2 * p - d * (k - 1) - 1) // s + 1) for size, k, s, p, d in axes]
