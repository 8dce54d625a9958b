import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomised
from torch import nn

from singe.graph.groups import Group, Slice
from singe.graph.trace import named_tensors
from singe.removal.plan import Plan
from singe.removal.surgery import compact, held_at_zero, mask

A, B, C = 5, 4, 6


class Concatenated(nn.Module):
    """a and b side by side are read by c, whose neurons head reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(3, A), nn.Linear(3, B), nn.Linear(A + B, C), nn.Linear(C, 2)

    def forward(self, x):
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1).relu()).relu())


def group(name, size, reader, before=0, after=0):
    own = torch.arange(size)
    nobody = torch.full((1,), -1)
    columns = torch.cat([nobody.expand(before), own, nobody.expand(after)])
    slices = (
        Slice(f"{name}.weight", 0, own, "writes"),
        Slice(f"{name}.bias", 0, own, "writes"),
        Slice(f"{reader}.weight", 1, columns, "reads"),
    )
    return Group(name, size, (f"{name}.weight",), slices, None)


GROUPS = [group("a", A, "c", after=B), group("b", B, "c", before=A), group("c", C, "head")]
SIZES = {g.name: g.size for g in GROUPS}


@pytest.fixture
def plan():
    plan = Plan()
    plan.add(GROUPS[0], [3, 0])
    plan.add(GROUPS[1], [2])
    return plan


def equal(a, b):
    a, b = named_tensors(a), named_tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_removal_names_all_indices_that_go_with_its_neurons(plan):
    removal = plan.removals[0]
    assert (removal.group, removal.size, removal.neurons) == ("a", A, (3, 0))
    assert {(c.tensor, c.axis): list(c.indices) for c in removal.cuts} == {
        ("a.weight", 0): [0, 3], ("a.bias", 0): [0, 3], ("c.weight", 1): [0, 3],
    }  # fmt: skip


def test_groups_that_share_an_axis_are_gathered(plan):
    assert plan.removed()[("c.weight", 1)].tolist() == [0, 3, A + 2]
    assert plan.removed()[("b.bias", 0)].tolist() == [2]


def test_rebasing_counts_in_what_is_left(plan):
    rest = Plan(plan.removals[:1]).rebase(GROUPS[1])
    assert rest.read("c.weight").neuron.tolist() == [-1, -1, -1, 0, 1, 2, 3]
    assert rest.written("b.weight").neuron.tolist() == [0, 1, 2, 3]
    assert (rest.name, rest.size, rest.writers) == (GROUPS[1].name, GROUPS[1].size, GROUPS[1].writers)
    untouched = Plan().rebase(GROUPS[1])
    assert all(torch.equal(a.neuron, b.neuron) for a, b in zip(untouched.slices, GROUPS[1].slices, strict=True))


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(3)), st.data())
def test_group_after_group_ends_where_the_whole_plan_does(order, data):
    model = randomised(Concatenated())
    step_by_step, whole = copy.deepcopy(model), Plan()
    for g in (GROUPS[i] for i in order):
        neurons = data.draw(st.lists(st.integers(0, g.size - 1), min_size=1, max_size=g.size - 1, unique=True))
        current, here = whole.rebase(g), Plan()
        here.add(current, neurons)
        compact(step_by_step, here.removed())
        whole.add(g, neurons)
    assert equal(whole.apply(copy.deepcopy(model)), step_by_step)
    again = Plan.from_json(json.loads(json.dumps(whole.to_json())))
    assert equal(again.apply(copy.deepcopy(model)), step_by_step)
    assert sum(p.numel() for p in step_by_step.parameters()) < sum(p.numel() for p in model.parameters())


def test_json_round_trip_is_exact(plan):
    data = json.loads(json.dumps(plan.to_json()))
    again = Plan.from_json(data)
    assert again.to_json() == data == plan.to_json()
    assert [(r.group, r.size, r.neurons) for r in again.removals] == [("a", A, (3, 0)), ("b", B, (2,))]
    assert again == plan
    assert Plan.from_json(json.loads(json.dumps(Plan().to_json()))).removed() == {}


def test_apply_returns_the_model_it_changed(plan):
    model = randomised(Concatenated())
    assert plan.apply(model) is model
    assert (model.a.out_features, model.b.out_features, model.c.in_features) == (A - 2, B - 1, A + B - 3)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
}
KEPT = {"a.weight": (0, [1, 2, 4]), "a.bias": (0, [1, 2, 4]), "b.weight": (0, [0, 1, 3]), "b.bias": (0, [0, 1, 3]),
        "c.weight": (1, [1, 2, 4, A, A + 1, A + 3])}  # fmt: skip


def stepped(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_optimizer_goes_on_with_what_it_remembers_of_the_elements_that_stay(plan, make):
    model, foreign, x = randomised(Concatenated()), nn.Parameter(torch.ones(3)), torch.ones(4, 3)
    model.a.bias.requires_grad_(False)  # it never gets a gradient, so the optimiser remembers nothing of it
    weights, rest = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
    optimizer = make([{"params": [*weights, foreign], "lr": 0.01}, {"params": rest, "weight_decay": 0.1}])
    foreign.grad = torch.full((3,), 2.0)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()} | {id(foreign): "foreign"}
    settings_ = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    order = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    old = {names[id(p)]: {k: v.clone() for k, v in s.items() if v is not None} for p, s in optimizer.state.items()}
    assert old.keys() == {n for group in order for n in group} - {"a.bias"}
    assert plan.apply(model, optimizer) is model
    tensors = {**dict(model.named_parameters()), "foreign": foreign}
    held = [group["params"] for group in optimizer.param_groups]
    assert all(p is tensors[n] for ps, ns in zip(held, order, strict=True) for p, n in zip(ps, ns, strict=True))
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == settings_
    for name, state in old.items():
        for key, value in state.items():
            axis, keep = KEPT.get(name, (0, None))
            expected = value if keep is None or value.dim() == 0 else value.index_select(axis, torch.tensor(keep))
            assert torch.equal(optimizer.state[tensors[name]][key], expected) and expected.any(), (name, key)
    assert len(optimizer.state) == len(old)
    before = {n: p.detach().clone() for n, p in tensors.items()}
    stepped(model, optimizer, x)
    changed = {n for n, p in tensors.items() if not torch.equal(p, before[n])}
    assert changed >= {"a.weight", "b.weight", "c.weight", "head.weight", "b.bias"} and "a.bias" not in changed


def test_several_optimizers_follow():
    model, x, plan = randomised(Concatenated()), torch.ones(4, 3), Plan()
    plan.add(GROUPS[2], [1, 4])
    head = list(model.head.parameters())
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    optimizers = torch.optim.SGD(rest, 0.01, momentum=0.9), torch.optim.Adam(head, 0.01)
    for _ in range(2):
        for optimizer in optimizers:
            stepped(model, optimizer, x)
    plan.apply(model, *optimizers)
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == set(map(id, model.parameters()))
    for optimizer in optimizers:
        assert all(v.shape == p.shape for p, s in optimizer.state.items() for v in s.values() if v.dim())
        stepped(model, optimizer, x)


def test_training_goes_on_as_that_of_the_masked_network_does():
    """No neuron's momentum is lost or another's: both networks take the same steps where both have parameters."""
    masked, x, plan = randomised(Concatenated()).double(), torch.ones(4, 3, dtype=torch.float64), Plan()
    plan.add(GROUPS[2], [1, 4])
    optimizer = torch.optim.Adam(masked.parameters(), lr=0.01)
    for _ in range(3):
        stepped(masked, optimizer, x)
    mask(masked, GROUPS[2].slices, torch.tensor([1, 4]), optimizer)
    small = copy.deepcopy(masked)
    follower = torch.optim.Adam(small.parameters(), lr=0.01)
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan.apply(small, follower)
    with held_at_zero(masked, GROUPS[2].slices, torch.tensor([1, 4]), optimizer):
        for _ in range(5):
            stepped(masked, optimizer, x)
            stepped(small, follower, x)
    assert torch.allclose(masked.c.weight[[0, 2, 3, 5]], small.c.weight, atol=1e-12)
    assert torch.allclose(masked.head.weight[:, [0, 2, 3, 5]], small.head.weight, atol=1e-12)
    assert torch.allclose(masked.a.weight, small.a.weight, atol=1e-12)


def test_an_optimizer_that_cannot_follow_is_refused_and_nothing_changes(plan):
    model = randomised(Concatenated())
    before = copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"optimizer to be a torch\.optim.Optimizer, got dict"):
        plan.apply(model, {})
    with pytest.raises(ValueError, match="got SGD of none of them"):
        plan.apply(model, OPTIMIZERS["sgd"](before.parameters()))
    assert equal(model, before)


def test_a_plan_for_another_model_is_refused_and_changes_nothing(plan):
    other = nn.Sequential(nn.Linear(3, 2))
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=r"a\.weight"):
        plan.apply(other)
    assert equal(other, before)


def test_a_plan_is_not_applied_twice():
    plan = Plan()
    plan.add(GROUPS[0], [0])
    model = plan.apply(randomised(Concatenated()))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError):
        plan.apply(model)
    assert equal(model, before)


def edited(*path, value):
    def edit(data):
        at = data
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        return data

    return edit


def without(*path):
    def edit(data):
        at = data
        for key in path[:-1]:
            at = at[key]
        del at[path[-1]]
        return data

    return edit


FIRST = ("removals", 0, "cuts", 0)
DAMAGES = {
    "not an object": lambda data: [data],
    "other format": edited("format", value="safetensors"),
    "no format": without("format"),
    "later version": edited("version", value=2),
    "no version": without("version"),
    "no removals": without("removals"),
    "removals of another kind": edited("removals", value=3),
    "removal of another kind": edited("removals", 0, value="a"),
    "no neurons": without("removals", 0, "neurons"),
    "neurons of another kind": edited("removals", 0, "neurons", value=[0.0, 3.0]),
    "repeated neuron": edited("removals", 0, "neurons", value=[3, 3]),
    "size of another kind": edited("removals", 0, "size", value="5"),
    "no cuts": without("removals", 0, "cuts"),
    "no axis": without(*FIRST, "axis"),
    "axis of another kind": edited(*FIRST, "axis", value=True),
    "indices of another kind": edited(*FIRST, "indices", value="03"),
    "repeated index": edited(*FIRST, "indices", value=[0, 0]),
    "huge index": edited(*FIRST, "indices", value=[10**30]),
    "null": edited(*FIRST, "indices", value=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_plan_is_refused(plan, damage):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(damage(plan.to_json()))


MISFITS = {
    "negative index": edited(*FIRST, "indices", value=[-1]),
    "index beyond the axis": edited(*FIRST, "indices", value=[A]),
    "negative axis": edited(*FIRST, "axis", value=-1),
    "unknown tensor": edited(*FIRST, "tensor", value="z.weight"),
    "everything": edited(*FIRST, "indices", value=list(range(A))),
}


@pytest.mark.parametrize("damage", MISFITS.values(), ids=MISFITS.keys())
def test_a_plan_that_cannot_fit_is_refused_before_the_model_changes(plan, damage):
    model = randomised(Concatenated())
    before = copy.deepcopy(model)
    with pytest.raises(ValueError):
        Plan.from_json(damage(plan.to_json())).apply(model)
    assert equal(model, before)
