"""What of the CUDA kernels can be tested on the emulation alone: a GPU is lost to the process after a trap."""

import ctypes

import pytest
import torch
from test_ops import operators, replaced

ROWS = {"fade_neurons": 1, "fade_next": 2, "neuron_grad_norm": 2, "remove_neurons": 2}


@pytest.mark.parametrize("elements", [1, 129, 151, 1 << 20])
def test_the_sanitizer_knows_where_a_tensor_ends(elements):
    poisoned = ctypes.CDLL(None)["__asan_address_is_poisoned"]
    tensor = torch.zeros(elements, dtype=torch.float16)
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
    assert [poisoned(ctypes.c_void_p(at)) for at in (first - 1, first, last, last + 1)] == [1, 0, 0, 1]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("row", [-2, 99])
def test_rows_that_do_not_exist_trap(name, row):
    arguments = operators()[name]
    rows = arguments[ROWS[name]].clone()
    rows[-1] = row
    with pytest.raises(RuntimeError, match="a thread trapped"):
        getattr(torch.ops.singe, name)(*replaced(arguments, ROWS[name], rows))


def test_more_tiles_than_a_grid_has_blocks_raise():
    jobs, channels = 1 << 20, 1 << 17
    ones = torch.ones(jobs, dtype=torch.float64)
    vectors = torch.zeros(jobs, dtype=torch.int64), ones, ones[:1]
    x, delta = torch.ones(1, channels), torch.ones(jobs, 1)
    with pytest.raises(RuntimeError, match="too many jobs for one call"):
        torch.ops.singe.neuron_grad_norm(x, delta, *vectors, [], [], [], [], 1, 2.0, ones[:1].clone())
