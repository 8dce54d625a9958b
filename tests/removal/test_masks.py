import copy

import pytest
import torch
from networks import PlainNet, images, randomised
from torch import nn
from torch.nn.utils import prune as torch_prune
from wiring import normal

from singe.removal import masks


class Shared(nn.Module):
    """A weight that two modules hold, one of which is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.a(x).tanh()).tanh())


def half(tensor, seed=0):
    """A mask that keeps about half."""
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_masks_are_torchs_own_and_the_model_computes_with_zeros():
    model, x = randomised(PlainNet()), images()[0]
    kept = {n: half(model.get_parameter(n)) for n in ("features.0.weight", "classifier.3.weight")}
    zeroed = copy.deepcopy(model)
    for name, mask in kept.items():
        masks.zero_out(zeroed.get_parameter(name), mask)
    masks.put_on(model, kept)
    assert torch_prune.is_pruned(model.features[0]) and not torch_prune.is_pruned(model.features[4])
    assert torch.equal(model.features[0].weight_mask, kept["features.0.weight"].float())
    assert torch.equal(copy.deepcopy(model)(x), zeroed(x)) and torch.equal(model(x), zeroed(x))
    masks.take_off(model, kept)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in zeroed.named_parameters()}
    assert torch.equal(model(x), zeroed(x)) and not torch_prune.is_pruned(model)


def test_a_tied_weight_stays_one_with_masks_on_and_off():
    model = Shared()
    weight, kept = model.a.weight, half(model.a.weight)
    masks.put_on(model, {"a.weight": kept})
    assert masks.are_on(model, ["a.weight"]) and not masks.are_on(model, ["a.bias"])
    assert model.a.weight_orig is model.b.weight_orig is weight
    model(normal(3, 4)).sum().backward()
    assert torch.equal(weight.grad != 0, kept)
    masks.take_off(model, ["a.weight"])
    assert model.a.weight is model.b.weight is weight and not masks.are_on(model, ["a.weight"])
    assert torch.equal(weight != 0, kept)


def test_what_an_optimiser_remembers_goes_too():
    weight = nn.Parameter(torch.ones(3, 4))
    other, kept = nn.Parameter(torch.ones(2)), half(weight)
    optimizer = torch.optim.Adam([weight, other])
    (weight.sum() + other.sum()).backward()
    optimizer.step()
    masks.zero_out(weight, kept, optimizer)
    for tensor in (weight, optimizer.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg_sq"]):
        assert torch.equal(tensor != 0, kept)
    assert optimizer.state[weight]["step"] == 1 and bool(optimizer.state[other]["exp_avg"].all())


class Past(nn.Module):
    """Reads a weight without calling the module that holds it, or before that is called."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.kind == "past":
            return self.a(torch.nn.functional.linear(x, self.b.weight))
        if self.kind == "before":
            return self.b(self.a(torch.nn.functional.linear(x, self.b.weight)))
        return torch.nn.functional.linear(self.b(self.a(x)), self.b.weight)


@pytest.mark.parametrize(("kind", "bad"), [("past", {"b.weight"}), ("before", {"b.weight"}), ("behind", set())])
def test_a_weight_that_is_read_past_its_module_cannot_be_masked(kind, bad):
    model = Past(kind).eval()
    before = copy.deepcopy(model.state_dict())
    found = masks.unmaskable(model, ["a.weight", "b.weight"], normal(2, 4))
    assert set(found) == bad and all("where b is not called" in reason for reason in found.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_the_projections_of_an_attention():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    found = masks.unmaskable(
        attention, ["in_proj_weight", "out_proj.weight"], normal(2, 3, 8), lambda m, x: m(x, x, x)[0]
    )
    assert set(found) == {"out_proj.weight"}
