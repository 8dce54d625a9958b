import copy

import pytest
import torch
from networks import DigitNet, images, randomised
from torch import nn
from wiring import Wired, groups_of, normal, unsafe_groups

from singe.graph.analysis import find_groups
from singe.graph.groups import Group, Slice
from singe.graph.trace import named_tensors, trace
from singe.removal.plan import Plan
from singe.removal.surgery import mask
from singe.removal.trial import check_result, difference, expanded


def able(model, x):
    return [g for g in groups_of(model, x).values() if g.frozen is None]


def linear_group(name, size, reader, start=0, width=None):
    """Neurons of ``name`` that ``reader`` has as columns, rows [start, start + size) of width rows."""
    width = size if width is None else width
    rows = torch.full((width,), -1)
    rows[start : start + size] = torch.arange(size)
    slices = (
        Slice(f"{name}.weight", 0, rows, "writes"),
        Slice(f"{name}.bias", 0, rows, "writes"),
        Slice(f"{reader}.weight", 1, torch.arange(size), "reads"),
    )
    return Group(f"{name}{start}", size, (f"{name}.weight",), slices, None)


# unsafe_groups


@pytest.fixture(scope="module")
def digit():
    model, x = randomised(DigitNet(4)), images(channels=1)[0]
    return model, [g for g in find_groups(trace(model, x)) if g.frozen is None], x


def test_harmless_groups_are_safe_and_the_model_is_untouched(digit):
    model, groups, x = digit
    before = copy.deepcopy(model)
    assert len(groups) == 6
    assert unsafe_groups(model, groups, x) == {}
    assert unsafe_groups(model, [], x) == {}
    tensors = named_tensors(before)
    assert all(torch.equal(t, tensors[n]) for n, t in named_tensors(model).items())


def view(self, y):
    return y.view(y.shape[0], 8, -1).mean(2)


def attribute(self, y):
    return y.reshape(-1, int(self.width), 4, 4).mean((2, 3))


def scaled(self, y):
    return y.mean((2, 3)) * (10 / self.b.out_channels)


@pytest.mark.parametrize(
    ("guilty", "problem"), [(view, ""), (attribute, ""), (scaled, "the outputs of the masked and the compacted")]
)
def test_a_width_written_into_forward_freezes_its_group_and_no_other(guilty, problem):
    def wiring(self, x):
        y = self.b(self.a(x).relu()).relu()
        return self.head(self.c(guilty(self, y)).relu())

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 8, 1), c=nn.Linear(8, 7), head=nn.Linear(7, 2))
    model.width = 8.0  # no integer that could follow
    x = images(3, size=4)[0]
    groups = able(model, x)
    assert [g.name for g in groups] == ["a", "b", "c"]
    reasons = unsafe_groups(model, groups, x)
    assert reasons.keys() == {"b"}
    assert reasons["b"].startswith(f"trial removal failed: {problem}") and len(reasons["b"]) > 25


def test_two_guilty_groups_are_both_found():
    def wiring(self, x):
        y = self.b(self.a(x).view(-1, 5).relu())
        return self.head(self.c(y).view(-1, 7).relu())

    model = Wired(wiring, a=nn.Linear(4, 5), b=nn.Linear(5, 6), c=nn.Linear(6, 7), head=nn.Linear(7, 2))
    x = normal(3, 4)
    assert unsafe_groups(model, able(model, x), x).keys() == {"a", "c"}


@pytest.mark.parametrize("size", range(9, 15))
def test_a_single_neuron_that_must_stay_makes_its_group_unsafe(size):
    model = Wired(lambda self, x: self.b(torch.cat([self.a(x)[:, 1:], self.a(x)[:, :1]], 1)), a=nn.Linear(4, size))
    model.b = nn.Linear(size, 2)
    group = linear_group("a", size, "b")
    columns = Slice("b.weight", 1, torch.arange(size).roll(-1), "reads")
    group = Group("a", size, group.writers, (*group.slices[:2], columns), None)
    # all but the first may go
    assert unsafe_groups(model, [group], normal(3, 4)).keys() == {"a"}


def test_groups_that_may_only_shrink_together_are_unsafe():
    def wiring(self, x):
        first, second = self.a(x).relu().chunk(2, 1)
        return self.b(first) + self.c(second)

    model = Wired(wiring, a=nn.Linear(4, 12), b=nn.Linear(6, 3), c=nn.Linear(6, 3))
    x = normal(3, 4)
    groups = able(model, x)
    unsafe = unsafe_groups(model, groups, x)
    left = [g for g in groups if g.name not in unsafe]
    for group in left:  # whatever is left may be pruned alone
        masked, plan = copy.deepcopy(model), Plan()
        mask(masked, group.slices, torch.tensor([0]))
        plan.add(group, [0])
        assert difference(masked(x), plan.apply(copy.deepcopy(model))(x)) is None, group.name


def test_what_is_declared_safe_is_safe_together():
    def wiring(self, x):
        y = self.b(self.a(x).relu()).relu()
        if self.b.out_features < 8:  # guilty alone, but only of more than one neuron
            y = y * 2
        if self.a.out_features < 8 and self.c.out_features < 8:  # guilty only together
            y = y * 3
        return self.head(self.c(y).relu())

    model = Wired(wiring, a=nn.Linear(4, 9), b=nn.Linear(9, 9), c=nn.Linear(9, 9), head=nn.Linear(9, 2))
    x = normal(3, 4)
    groups = [linear_group("a", 9, "b"), linear_group("b", 9, "c"), linear_group("c", 9, "head")]
    unsafe = unsafe_groups(model, groups, x)
    assert "b0" in unsafe
    masked, plan = copy.deepcopy(model), Plan()
    for group in groups:
        if group.name not in unsafe:
            mask(masked, group.slices, torch.arange(3))
            plan.add(group, [0, 1, 2])
    assert plan.removals, "not everything is unsafe"
    assert difference(masked(x), plan.apply(copy.deepcopy(model))(x)) is None


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.side, self.b = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        y = self.a(x).relu()
        return (self.b(y), self.side(y)) if self.training else self.b(y)


def dropped(self, x):
    y = self.a(x).relu()
    self.side(y)
    return self.b(y)


@pytest.mark.parametrize(("kind", "where"), [("only in train mode", "in train mode, "), ("result is dropped", "")])
def test_a_group_is_unsafe_that_is_read_by_a_layer_which_the_graph_does_not_show(kind, where):
    if kind == "result is dropped":
        model = Wired(dropped, a=nn.Linear(6, 5), side=nn.Linear(5, 3), b=nn.Linear(5, 3))
    else:
        model = randomised(Auxiliary())
    x = normal(3, 6)
    groups = able(model, x)
    assert [g.name for g in groups] == ["a"]
    reason = f"trial removal failed: {where}mat1 and mat2 shapes cannot be multiplied (3x4 and 5x3)"
    assert unsafe_groups(model, groups, x) == {"a": reason}


# difference, expanded, check_result


@pytest.fixture(scope="module")
def pruned(digit):
    model, groups, x = digit
    plan, small = Plan(), copy.deepcopy(model)
    for i, group in enumerate(groups):
        plan.add(group, list(range(i % 3, group.size, 3)))
    plan.apply(small)
    with torch.no_grad():  # as if trained on
        for p in small.parameters():
            p.mul_(1.1)
    return model, small, plan, x


def test_a_faithful_result_passes(pruned):
    model, small, plan, x = pruned
    check_result(model, small, plan, x)
    assert not torch.allclose(model(x), small(x))


def test_what_rounding_decides_is_compared_in_float64(caplog):
    def wiring(self, x):
        return self.head(self.body(x).relu()).argmax(1)

    model = Wired(wiring, body=nn.Linear(400, 400), head=nn.Linear(400, 64))
    with torch.no_grad():  # as good as tied everywhere
        model.head.weight.copy_(model.head.weight[:1] + 1e-8 * normal(64, 400))
        model.head.bias.zero_()
    x = normal(500, 400)
    (group,) = (g for g in find_groups(trace(model, x)) if g.name == "body")
    plan, small = Plan(), copy.deepcopy(model)
    plan.add(group, list(range(0, 400, 2)))
    plan.apply(small)
    full = expanded(model, small, plan)
    assert not torch.equal(full(x), small(x)) and torch.equal(
        full.double()(x.double()), copy.deepcopy(small).double()(x.double())
    )
    with caplog.at_level("INFO", "singe"):
        check_result(model, small, plan, x)
    assert "but not in float64, so that it seems to be rounding" in caplog.text
    assert small.head.weight.dtype == torch.float32


def test_expanding_a_result_puts_zero_where_the_plan_cut(pruned):
    model, small, plan, x = pruned
    full = expanded(model, small, plan)
    for name, tensor in named_tensors(full).items():
        kept = tensor
        for dim in range(tensor.dim()):
            cut = plan.removed().get((name, dim), torch.tensor([], dtype=torch.int64))
            assert not tensor.index_select(dim, cut).any()
            keep = torch.tensor([i for i in range(tensor.shape[dim]) if i not in cut.tolist()])
            kept = kept.index_select(dim, keep)
        assert torch.equal(kept, named_tensors(small)[name])
    assert full is not model and torch.equal(model(x), copy.deepcopy(model)(x))


def test_expanding_keeps_tied_weights_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    plan, small = Plan(), copy.deepcopy(model)
    index = torch.tensor([0, 2])
    every = torch.tensor([0, -1, 1, -1])
    slices = [
        Slice(n, d, every, ("writes", "reads")[d])
        for n, d in (("2.weight", 0), ("0.weight", 1), ("0.bias", 0), ("2.bias", 0), ("4.weight", 1))
    ]
    plan.add(Group("0", 2, ("0.weight",), tuple(slices), None), [0, 1])
    plan.apply(small)
    full = expanded(model, small, plan)
    assert full[2].weight is full[0].weight
    assert not full[0].weight[index].any() and not full[0].weight[:, index].any()
    assert torch.equal(full[2].weight[1::2, 1::2], small[0].weight)


def other_constant(small):
    small.blocks[1].bn1.eps = 0.1


def not_finite(small):
    small.register_forward_hook(lambda module, args, out: out * float("nan"))


def other_shape(small):
    small.register_forward_hook(lambda module, args, out: out[:, :3])


def more_outputs(small):
    small.register_forward_hook(lambda module, args, out: (out, out))


@pytest.mark.parametrize("tamper", [other_constant, not_finite, other_shape, more_outputs], ids=lambda f: f.__name__)
def test_a_network_that_computes_something_else_is_reported(pruned, tamper):
    model, small, plan, x = pruned
    small = copy.deepcopy(small)
    tamper(small)
    with pytest.raises(RuntimeError, match="the pruned network is not the masked one"):
        check_result(model, small, plan, x)


def test_difference_sees_every_output_and_small_errors():
    def wiring(self, x):
        return {"a": self.a(x), "rest": [self.b(x), 3]}

    model, x = Wired(wiring, a=nn.Linear(4, 3), b=nn.Linear(4, 2)).double(), normal(3, 4, dtype=torch.float64)
    other = copy.deepcopy(model)
    assert difference(model(x), other(x)) is None
    with torch.no_grad():
        other.b.bias[1] += 1e-6
    assert "differ by 1.00e-06" in difference(model(x), other(x))
    assert "returns Tensor where the compacted one returns int" in difference([x], [1])


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError])
def test_whatever_forward_raises_on_a_cut_network_freezes_the_group(error):
    def wiring(self, x):
        y = self.a(x).relu()
        if y.shape[1] != 8:
            raise error
        return self.b(y)

    model = Wired(wiring, a=nn.Linear(4, 8), b=nn.Linear(8, 2))
    x = normal(3, 4)
    assert unsafe_groups(model, able(model, x), x) == {"a": f"trial removal failed: {error.__name__}"}
