import copy
import random

import pytest
import torch
from architectures import STAGES, Assembled
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from networks import PlainNet, images, randomised
from torch import nn
from wiring import normal

from singe.allocation.cost import parameter_cost
from singe.graph.analysis import find_groups
from singe.graph.groups import Slice
from singe.graph.trace import named_tensors, trace
from singe.models.numerics import close
from singe.removal.plan import Plan
from singe.removal.surgery import compact, held_at_zero, mask
from singe.removal.trial import expanded
from singe.sizes import count_parameters


def pair(**options):
    """A convolution with batch norm read by another convolution."""
    return randomised(
        nn.Sequential(nn.Conv2d(3, 5, 3, **options), nn.BatchNorm2d(5), nn.SiLU(), nn.Conv2d(5, 4, 1, bias=False))
    )


def gone(*indices):
    """What goes with some channels of ``pair``."""
    index = torch.tensor(indices, dtype=torch.int64)
    norms = [("1.weight", 0), ("1.bias", 0), ("1.running_mean", 0), ("1.running_var", 0)]
    return dict.fromkeys([("0.weight", 0), ("0.bias", 0), *norms, ("3.weight", 1)], index)


def trained(model, optimizer, steps=2, shape=(4, 3, 8, 8)):
    """Steps in train mode, so that gradients and optimiser state are there."""
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(normal(*shape, seed=step, dtype=next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()


# compact


widths = st.integers(2, 6)
stages = st.lists(st.tuples(st.sampled_from(sorted(STAGES)), widths), min_size=1, max_size=3)
QUICK = settings(  # an export each: no shrinking
    max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@QUICK
@given(stages, st.sampled_from(["flatten", "mean"]), st.integers(0, 999))
@example([(kind, 3) for kind in STAGES], "flatten", 0)
def test_removed_neurons_are_as_if_masked_and_the_rest_trains_on(stages, tail, seed):
    chance = random.Random(seed)
    model = Assembled(stages, tail, "silu").double()
    x = normal(4, 3, 6, 6, dtype=torch.float64)
    groups = [g for g in find_groups(trace(model, x)) if g.frozen is None and g.size > 1]
    assert {"stem", "hidden"} <= {module for g in groups for module in g.members}
    masked, compacted, plan = copy.deepcopy(model), copy.deepcopy(model), Plan()
    optimizer = torch.optim.SGD(compacted.parameters(), lr=0.01, momentum=0.9)
    trained(compacted, optimizer, steps=1, shape=(4, 3, 6, 6))
    compacted.load_state_dict(model.state_dict())
    removed = []
    for group in groups:
        neurons = chance.sample(range(group.size), chance.randint(1, group.size - 1))
        removed.append(len(neurons))
        mask(masked, group.slices, torch.tensor(neurons))
        plan.add(group, neurons)
    compact(compacted, plan.removed(), optimizer)
    with torch.no_grad():
        expected = masked.eval()(x)
        assert close(compacted.eval()(x), expected)
        assert not close(model(x), expected)
    count = parameter_cost(model, groups)
    assert count_parameters(model) - count_parameters(compacted) == count.gone(removed) > 0
    before = {n: p.clone() for n, p in compacted.named_parameters()}
    trained(compacted, optimizer, steps=1, shape=(4, 3, 6, 6))
    assert all(p.isfinite().all() for p in compacted.parameters())
    assert all(not torch.equal(p, before[n]) for n, p in compacted.named_parameters() if n.endswith("weight"))


def test_values_that_stay_are_the_old_ones():
    model = pair()
    old = {n: t.clone() for n, t in model.state_dict().items()}
    compact(model, gone(1, 3))
    assert torch.equal(model[0].weight, old["0.weight"][[0, 2, 4]])
    assert torch.equal(model[1].running_var, old["1.running_var"][[0, 2, 4]])
    assert torch.equal(model[3].weight, old["3.weight"][:, [0, 2, 4]])


def test_two_axes_of_one_tensor_are_cut_at_once():
    model = nn.Sequential(nn.Linear(4, 5))
    old = model[0].weight.detach().clone()
    compact(
        model,
        {("0.weight", 0): torch.tensor([0]), ("0.weight", 1): torch.tensor([3, 1]), ("0.bias", 0): torch.tensor([0])},
    )
    assert torch.equal(model[0].weight, old[1:][:, [0, 2]])
    assert (model[0].in_features, model[0].out_features) == (2, 4)


def test_attributes_follow_the_tensors():
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6, affine=False), nn.Conv1d(6, 4, 1, groups=2), nn.Linear(5, 3)
    )
    indices = torch.tensor([0, 5])
    compact(
        model,
        {
            ("0.weight", 0): indices,
            ("0.bias", 0): indices,
            ("1.running_mean", 0): indices,
            ("1.running_var", 0): indices,
        },
    )
    assert (model[0].in_channels, model[0].out_channels) == (4, 4)
    assert model[1].num_features == 4
    assert (model[2].in_channels, model[2].out_channels, model[2].groups) == (6, 4, 2)
    assert (model[3].in_features, model[3].out_features) == (5, 3)
    assert "Conv1d(4, 4" in repr(model)


def cut_in_turns(model, x, *turns, optimizer=None):
    """Removes {group: neurons} turn by turn, as a run does: what is left is cut again."""
    groups, plan = {g.name: g for g in find_groups(trace(model, x))}, Plan()
    for turn in turns:
        here = Plan()
        for name, neurons in turn.items():
            here.add(plan.rebase(groups[name]), neurons)
        compact(model, here.removed(), optimizer)
        for name, neurons in turn.items():
            plan.add(groups[name], neurons)
    return plan


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_depthwise_convolution_loses_whole_groups(kind, multiplier):
    width, rank = 4 * multiplier, CONVOLUTIONS.index(kind) + 1
    model = randomised(
        nn.Sequential(kind(3, 4, 1), nn.ReLU(), kind(4, width, 3, padding=1, groups=4), nn.ReLU(), kind(width, 2, 1))
    )
    x, old = normal(2, 3, *[5] * rank), copy.deepcopy(model)
    plan = cut_in_turns(model, x, {"0": [0, 2]})
    kept = [multiplier * neuron + i for neuron in (1, 3) for i in range(multiplier)]
    assert torch.equal(model[2].weight, old[2].weight[kept]) and torch.equal(model[2].bias, old[2].bias[kept])
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (2, 2, 2 * multiplier)
    assert model[4].in_channels == 2 * multiplier
    assert f"(2, {2 * multiplier}, kernel_size=" in repr(model[2]) and "groups=2" in repr(model[2])
    assert close(model(x), expanded(old, model, plan)(x))


def test_a_depthwise_convolution_of_one_channel_is_a_convolution_without_groups():
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 2, 1)))
    x, old = images()[0], copy.deepcopy(model)
    plan = cut_in_turns(model, x, {"0": [0, 2, 3]})
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (1, 1, 2)
    assert "groups" not in repr(model[2])
    assert close(model(x), expanded(old, model, plan)(x))


def test_a_layer_that_is_the_whole_model_is_cut_as_any_other():
    model, gone = nn.Conv2d(4, 6, 1, groups=2), torch.tensor([1, 4])
    with pytest.raises(ValueError, match="as many rows of each of the 2 groups of weight"):
        compact(model, {("weight", 0): torch.tensor([0, 1])})
    compact(model, {("weight", 0): gone, ("bias", 0): gone})
    assert (model.groups, model.in_channels, model.out_channels) == (2, 4, 4)
    norm, gone = nn.GroupNorm(3, 6), torch.tensor([2, 3])
    compact(norm, {("weight", 0): gone, ("bias", 0): gone})
    assert (norm.num_groups, norm.num_channels) == (2, 4)


def grouped():
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1)))


def test_a_group_norm_loses_whole_groups():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2d(6, 2, 1))
    x = normal(2, 3, 4, 4)
    masked, rows = copy.deepcopy(model), torch.tensor([2, 3])
    axes = [(f"{i}.{name}", 0) for i in (0, 1) for name in ("weight", "bias")] + [("2.weight", 1)]
    for name, dim in axes:
        dict(masked.named_parameters())[name].data.index_fill_(dim, rows, 0)
    compact(model, dict.fromkeys(axes, rows))
    assert (model[1].num_groups, model[1].num_channels) == (2, 4)
    torch.testing.assert_close(model(x), masked(x))


def test_a_grouped_convolution_keeps_its_groups_and_loses_the_same_of_each():
    model, x = grouped(), images()[0]
    old = copy.deepcopy(model)
    plan = cut_in_turns(model, x, {"0": [0]}, {"2": [1]})
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (2, 2, 4)
    assert torch.equal(model[0].weight, old[0].weight[[1, 3]])
    assert torch.equal(model[2].weight, old[2].weight[[0, 2, 3, 5]][:, [1]])
    assert "Conv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), groups=2)" in repr(model)
    assert close(model(x), expanded(old, model, plan)(x))


def test_a_grouped_convolution_left_with_one_column_is_not_taken_for_a_depthwise_one():
    model, x = grouped(), images()[0]
    old = copy.deepcopy(model)
    plan = cut_in_turns(model, x, {"0": [1]}, {"2": [2]}, {"2": [0]})
    assert model[2].weight.shape[:2] == (2, 1)
    assert (model[2].groups, model[2].in_channels, model[2].out_channels) == (2, 2, 2)
    at_once = plan.apply(copy.deepcopy(old))
    assert at_once[2].groups == 2 and torch.equal(at_once(x), model(x))
    assert close(model(x), expanded(old, model, plan)(x))


@pytest.mark.parametrize(
    ("groups", "kept", "columns"), [(4, [2, 3, 4, 5], [0]), (2, [0, 2, 4, 6], [1])], ids=["depthwise", "grouped"]
)
def test_momentum_of_grouped_convolutions_goes_with_its_rows_and_columns(groups, kept, columns):
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=groups), nn.Conv2d(8, 2, 1)
    model = randomised(nn.Sequential(*layers))
    optimizer = MAKE["sgd"](model.parameters())
    x, turn = images()[0], {"0": [0, 3]} if groups == 4 else {"0": [0], "2": [1, 3]}
    trained(model, optimizer)
    old = optimizer.state[model[2].weight]["momentum_buffer"].clone()
    cut_in_turns(model.eval(), x, turn, optimizer=optimizer)
    found = optimizer.state[model[2].weight]["momentum_buffer"]
    assert torch.equal(found, old[kept][:, columns]) and found.any()
    trained(model, optimizer)


def test_requires_grad_train_mode_and_kind_stay():
    model = pair()
    model[0].weight.requires_grad_(False)
    model[3].train()
    compact(model, gone(0))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["0.weight"]
    assert [m.training for m in model] == [False, False, False, True]
    assert isinstance(model[0].weight, nn.Parameter) and model[0].weight.is_leaf
    assert set(dict(model.named_buffers())) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert set(model.state_dict()) == set(pair().state_dict())


def test_buffers_that_are_not_saved_stay_so():
    model = pair()
    model[1].register_buffer("side", normal(5), persistent=False)
    compact(model, {**gone(2), ("1.side", 0): torch.tensor([2])})
    assert model[1].side.shape == (4,) and "1.side" not in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    model = pair().to(dtype)
    compact(model, gone(1))
    assert {t.dtype for t in named_tensors(model).values()} == {dtype, torch.int64}


@pytest.mark.parametrize(
    ("kind", "layout"), [(nn.Conv2d, torch.channels_last), (nn.Conv3d, torch.channels_last_3d)], ids=["2d", "3d"]
)
def test_memory_format_stays(kind, layout):
    model = nn.Sequential(kind(3, 6, 3)).to(memory_format=layout)
    old = model[0].weight.detach().clone()
    compact(
        model,
        {("0.weight", 0): torch.tensor([4]), ("0.bias", 0): torch.tensor([4]), ("0.weight", 1): torch.tensor([0])},
    )
    assert torch.equal(model[0].weight, old[[0, 1, 2, 3, 5]][:, 1:])
    assert model[0].weight.is_contiguous(memory_format=layout) and not model[0].weight.is_contiguous()


def test_hooks_still_run():
    model, seen = pair(), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    compact(model, gone(0, 4))
    model(images()[0])
    assert seen == [3]


def test_hooks_of_parameters_still_run_and_their_handles_still_remove_them():
    model, seen = pair(), []
    weight = model[0].weight
    handles = [
        weight.register_hook(lambda gradient: seen.append(gradient.shape[0]) or 2 * gradient),
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p)),
    ]
    compact(model, gone(0, 4))
    model(images()[0]).sum().backward()
    assert seen[0] == 3 and seen[1] is model[0].weight
    doubled = model[0].weight.grad.clone()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model(images()[0]).sum().backward()
    assert torch.allclose(2 * model[0].weight.grad, doubled) and len(seen) == 2


def test_hooks_of_a_parameter_that_is_frozen_for_now_wait_for_it():
    model, seen = pair(), []
    model[0].weight.register_hook(seen.append)
    model[0].weight.requires_grad_(False)
    compact(model, gone(1))
    model[0].weight.requires_grad_(True)
    model(images()[0]).sum().backward()
    assert [g.shape[0] for g in seen] == [4]


class Marked(nn.Parameter):
    """A parameter that must be told something when it is made."""

    def __new__(cls, data, mark):
        return super().__new__(cls, data)

    def __init__(self, data, mark):
        self.mark = mark


def test_classes_and_attributes_of_parameters_and_buffers_stay():
    model = pair()
    model[0].weight = Marked(model[0].weight.detach(), "first")
    model[0].bias.decayed, model[1].running_mean.where = False, "here"
    old = model[0].weight
    compact(model, gone(1))
    weight = model[0].weight
    assert type(weight) is Marked and weight.mark == "first" and torch.equal(weight, old[[0, 2, 3, 4]])
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf
    assert vars(model[0].bias) == {"decayed": False} and model[1].running_mean.where == "here"
    assert vars(model[3].weight) == {}


def test_members_of_parameter_lists_and_dicts_are_cut_where_they_are():
    model = nn.Module()
    model.all = nn.ParameterList([nn.Parameter(normal(4, 3)), nn.Parameter(normal(2, 4))])
    model.named = nn.ParameterDict({"gain": nn.Parameter(normal(4)), "other": nn.Parameter(normal(5))})
    old = {n: p.detach().clone() for n, p in model.named_parameters()}
    compact(model, dict.fromkeys([("all.0", 0), ("all.1", 1), ("named.gain", 0)], torch.tensor([2])))
    keep = [0, 1, 3]
    assert torch.equal(model.all[0], old["all.0"][keep]) and torch.equal(model.all[1], old["all.1"][:, keep])
    assert torch.equal(model.named["gain"], old["named.gain"][keep]) and len(model.named["other"]) == 5
    assert [n for n, _ in model.named_parameters()] == list(old)


def test_tied_weights_stay_one_parameter():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    model[4].weight = model[2].weight
    model[4].bias = model[2].bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer, shape=(3, 4))
    old = model[2].weight.detach().clone()
    # a tied tensor may be named by either of its names
    index = torch.tensor([1, 5])
    axes = [("2.weight", 0), ("4.weight", 1), ("4.bias", 0), ("0.weight", 0), ("0.bias", 0), ("5.weight", 1)]
    compact(model, dict.fromkeys(axes, index), optimizer)
    keep = [0, 2, 3, 4]
    assert model[4].weight is model[2].weight and model[4].bias is model[2].bias
    assert torch.equal(model[2].weight, old[keep][:, keep])
    assert (model[4].in_features, model[4].out_features) == (4, 4)
    held = optimizer.param_groups[0]["params"]
    assert len(held) == len(list(model.parameters())) and all(
        a is b for a, b in zip(held, model.parameters(), strict=True)
    )
    trained(model, optimizer, shape=(3, 4))


def test_gradients_are_dropped():
    model = pair()
    model(images()[0]).sum().backward()
    compact(model, {})
    assert all(p.grad is not None for p in model.parameters())
    compact(model, gone(1))
    assert all(p.grad is None for p in model.parameters())


MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
def test_optimizer_state_goes_with_its_rows_and_columns(make):
    model = pair()
    decayed, others = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    optimizer = make([{"params": decayed, "lr": 0.5e-2}, {"params": others, "weight_decay": 0.0}])
    trained(model, optimizer)
    names = {p: n for n, p in model.named_parameters()}
    settings_ = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    old = {names[p]: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    removed = gone(0, 3)
    compact(model, removed, optimizer)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings_
    parameters = dict(model.named_parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in parameters.values()}
    assert all(any(p is q for q in parameters.values()) for p in optimizer.state)
    keep = torch.tensor([1, 2, 4])
    for name, state in old.items():
        for key, value in state.items():
            found = optimizer.state[parameters[name]][key]
            if not isinstance(value, torch.Tensor) or value.dim() == 0:
                assert found == value
                continue
            for dim in (0, 1):  # an average over an axis is 1 long there
                whole = value.dim() > dim and value.shape[dim] == 5
                value = value.index_select(dim, keep) if (name, dim) in removed and whole else value
            assert torch.equal(found, value) and value.any()
    trained(model, optimizer)


class Factored(torch.optim.Optimizer):
    """Keeps averages over an axis of parameters that are large enough, as Adafactor of big_vision and timm does."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if len(p) >= 5):
            self.state[parameter]["r"] = parameter.grad.square().mean(0, keepdim=True)


def test_averages_over_an_axis_are_refused_of_an_optimizer_that_may_want_others_of_smaller_parameters():
    model = pair()
    optimizer = Factored(model.parameters())
    trained(model, optimizer)
    with pytest.raises(ValueError, match=r"per element, got r of shape \(1, 3, 3, 3\) for 0\.weight .* new Factored"):
        compact(model, gone(0, 3), optimizer)
    assert model[0].weight.shape[0] == 5


def test_an_optimizer_that_shares_the_list_of_its_parameters_steps_on_the_smaller_ones():
    model = pair()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    compact(model, gone(1), optimizer)
    x, before = normal(4, 3, 8, 8), model[0].weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match=r"per element, got d of shape .* for 0\.weight .*make a new LBFGS"):
        compact(model, dict.fromkeys([("0.weight", 0), ("0.bias", 0)], torch.tensor([0])), optimizer)
    assert model[0].weight.shape[0] == 4


WRONG = {
    "unknown name": ({("5.weight", 0): [0]}, "5.weight"),
    "module instead of tensor": ({("0", 0): [0]}, "'0'"),
    "axis": ({("0.weight", 4): [0]}, "axis of 0.weight"),
    "negative axis": ({("0.weight", -1): [0]}, "axis of 0.weight"),
    "index": ({("3.weight", 1): [5]}, r"axis 1 of 3.weight in \[0, 5\)"),
    "negative index": ({("3.weight", 1): [-1]}, r"axis 1 of 3.weight in \[0, 5\)"),
    "index of an attribute": ({("2.width", 0): [4]}, r"axis 0 of 2.width in \[0, 4\)"),
    "emptied attribute": ({("2.width", 0): [0, 1, 2, 3]}, "at least one index of axis 0 of 2.width"),
    "part of a convolution's group": (
        {("4.weight", 0): [0]},
        r"each of the 2 groups of 4.weight to stay, got \[2, 3\]",
    ),
    "emptied axis": ({("1.running_var", 0): [0, 1, 2, 3, 4]}, "at least one index of axis 0 of 1.running_var"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_refused_changes_nothing(wrong, message):
    model = nn.Sequential(*pair(), nn.Conv2d(4, 6, 1, groups=2))
    model[2].width = 4
    optimizer = MAKE["sgd"](model.parameters())
    trained(model, optimizer)
    before, values = named_tensors(model), {n: t.clone() for n, t in model.state_dict().items()}
    state = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    with pytest.raises(ValueError, match=message):
        compact(model, {**gone(1), **{k: torch.tensor(v) for k, v in wrong.items()}}, optimizer)
    after = named_tensors(model)
    assert all(after[n] is before[n] and torch.equal(after[n], values[n]) for n in before)
    assert model[0].out_channels == 5 and all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(optimizer.state[p]["momentum_buffer"], m) for p, m in state.items())


def test_removing_nothing_changes_no_value():
    model = randomised(PlainNet())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    compact(model, {("features.0.weight", 0): torch.tensor([], dtype=torch.int64)})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


# mask and held_at_zero

CHANNELS = torch.arange(5)
SLICES = [Slice(name, dim, CHANNELS, ("writes", "reads")[dim]) for name, dim in gone()]


def entries(model, neurons):
    return torch.cat(
        [t.index_select(s.dim, neurons).flatten() for s in SLICES for t in [named_tensors(model)[s.tensor]]]
    )


def test_masking_zeroes_the_neurons_and_their_momentum_and_nothing_else():
    model = pair()
    optimizer = MAKE["adam"](model.parameters())
    trained(model, optimizer)
    before = copy.deepcopy(model)
    neurons, others = torch.tensor([4, 1]), torch.tensor([0, 2, 3])
    mask(model, SLICES, neurons, optimizer)
    assert not entries(model, neurons).any()
    assert torch.equal(entries(model, others), entries(before, others))
    for state in optimizer.state.values():
        assert state["step"] == 2
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        moments = optimizer.state[model[3].weight][key]
        assert not moments[:, neurons].any() and moments[:, others].all()


@pytest.mark.parametrize("make", [MAKE["sgd"], MAKE["adam"]], ids=["sgd", "adam"])
def test_masked_neurons_stay_zero_through_training_and_the_others_learn(make):
    torch.manual_seed(0)
    model = randomised(
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Sigmoid(), nn.Conv2d(5, 4, 1, bias=False))
    )
    optimizer = make(model.parameters())
    trained(model, optimizer)  # momentum that would carry the masked neurons away
    neurons, others = torch.tensor([0, 2]), torch.tensor([1, 3, 4])
    mask(model, SLICES, neurons, optimizer)
    before = entries(model, others).clone()
    with held_at_zero(model, SLICES, neurons, optimizer):
        for _ in range(3):
            trained(model, optimizer, steps=1)
            assert not entries(model, neurons).any()
    assert (entries(model, others) != before).all()
    trained(model, optimizer, steps=1)
    assert entries(model, neurons).any(), "sigmoid(0) is not zero: readers' columns learn again once released"


def test_neurons_are_released_after_an_exception():
    model = pair()
    optimizer = MAKE["sgd"](model.parameters())
    with pytest.raises(KeyboardInterrupt), held_at_zero(model, SLICES, torch.tensor([0]), optimizer):
        raise KeyboardInterrupt
    trained(model, optimizer, steps=1)
    assert entries(model, torch.tensor([0])).all()


def test_an_optimiser_that_keeps_all_state_with_one_parameter_is_refused_though_that_is_not_cut():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.rand(8, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(ValueError, match=r"one value per element, .* for 0\.weight .* make a new LBFGS"):
        compact(model, {("2.weight", 0): torch.tensor([1]), ("2.bias", 0): torch.tensor([1]),
                        ("4.weight", 1): torch.tensor([1])}, optimizer)  # fmt: skip
    assert model[2].weight.shape == (6, 4)


def test_a_model_with_a_zero_grad_of_its_own_is_cut():
    class Own(nn.Sequential):
        def zero_grad(self):
            raise AssertionError

    model = Own(*pair())
    compact(model, gone(1))
    assert model[0].out_channels == 4
