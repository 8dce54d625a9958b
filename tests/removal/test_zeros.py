import copy
import math

import pytest
import torch
from torch import nn
from wiring import normal

from singe.graph.trace import named_tensors
from singe.removal.surgery import zero
from singe.removal.zeros import Zeros

MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.1),  # keeps means over an axis
}
GONE = {("0.weight", 0): torch.tensor([1, 3]), ("0.bias", 0): torch.tensor([1, 3]), ("2.weight", 1): torch.tensor([1])}


def pair(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype)


def step(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = normal(*parameter.shape).to(parameter.dtype)
    optimizer.step()


def clean(model, optimizer):
    """Whether all that is gone is zero, in the optimiser's state, too."""
    for (name, dim), index in GONE.items():
        tensor = named_tensors(model)[name]
        for value in (tensor, *optimizer.state[tensor].values()):
            if value.dim() > dim and value.shape[dim] == tensor.shape[dim] and value.index_select(dim, index).any():
                return False
    return True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKE)
def test_weights_and_state_come_to_what_filling_them_with_zeros_comes_to(make, dtype):
    model = pair(dtype)
    optimizer = MAKE[make](model.parameters())
    step(model, optimizer)
    expected, others = copy.deepcopy((model, optimizer))
    zero(expected, GONE, others)
    Zeros(model, GONE).restore(optimizer)
    assert clean(model, optimizer)
    for (name, a), b in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
        for value, same in zip(optimizer.state[a].values(), others.state[b].values(), strict=True):
            assert torch.equal(value, same), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_becomes_zero_where_it_is_masked_and_stays_elsewhere(value):
    model = pair()
    optimizer = MAKE["adam"](model.parameters())
    step(model, optimizer)
    with torch.no_grad():
        for tensor in (model[0].weight, optimizer.state[model[0].weight]["exp_avg_sq"]):
            tensor[:2] = value
    Zeros(model, GONE).restore(optimizer)
    assert clean(model, optimizer)
    assert not model[0].weight[0].isfinite().any() and model[0].weight[2:].isfinite().all()


def test_what_lies_where_it_did_is_looked_up_once_and_zeroed_by_one_operator_for_each_dtype(monkeypatch):
    calls, looks, model = [], [], pair()
    model[2].to(torch.float64)
    optimizer, held = MAKE["adam"](model.parameters()), Zeros(model, GONE)
    foreach, look = torch._foreach_mul_, Zeros._look
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *lists: calls.append(len(lists[0])) or foreach(*lists))
    monkeypatch.setattr(Zeros, "_look", lambda *args: looks.append(1) or look(*args))
    for _ in range(3):
        step(model, optimizer)
        held.restore(optimizer)
        assert clean(model, optimizer)
    assert calls == [8, 4] * 3 and len(looks) == 1


def replace(model, optimizer):
    model[0].weight = nn.Parameter(normal(5, 3))
    optimizer.param_groups[0]["params"][0] = model[0].weight


def move(model, optimizer):
    model[0].weight.data = model[0].weight.data.clone()


def transpose(model, optimizer):
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


def reload(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forget(model, optimizer):
    optimizer.state.clear()


def cast(model, optimizer):
    model.double()
    forget(model, optimizer)


@pytest.mark.parametrize("change", [replace, move, transpose, reload, forget, cast])
@pytest.mark.parametrize("make", MAKE)
def test_weights_and_state_may_be_replaced_between_steps(make, change):
    model = pair()
    optimizer, held = MAKE[make](model.parameters()), Zeros(model, GONE)
    for _ in range(2):
        step(model, optimizer)
        held.restore(optimizer)
    change(model, optimizer)
    for _ in range(2):
        step(model, optimizer)
        held.restore(optimizer)
        assert clean(model, optimizer)


def test_a_weight_of_two_names_loses_what_either_of_them_does():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    gone = {("0.weight", 0): torch.tensor([0]), ("1.weight", 1): torch.tensor([2])}
    optimizer, held = MAKE["sgd"](model.parameters()), Zeros(model, gone)
    for _ in range(2):
        step(model, optimizer)
        held.restore(optimizer)
        zeroed = model[0].weight == 0
        assert zeroed[0].all() and zeroed[:, 2].all() and zeroed.sum() == 7


def test_an_optimiser_that_is_gone_is_not_kept():
    model, held = pair(), Zeros(pair(), GONE)
    optimizer = MAKE["sgd"](model.parameters())
    held.restore(optimizer)
    assert len(held._held) == 1
    del optimizer
    assert not held._held


def test_sparse_state_of_another_network_is_nothing_to_hold():
    zeros, table = Zeros(pair(), GONE), nn.Embedding(9, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        table(torch.arange(3)).sum().backward()
        optimizer.step()
        before = table.weight.detach().clone()
        zeros.restore(optimizer)
        assert torch.equal(table.weight, before)
