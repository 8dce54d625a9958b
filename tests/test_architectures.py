"""Networks of every kind, pruned and looked at from all sides."""

import copy
import re
import tempfile

import torch
from architectures import ACTIVATIONS, STAGES, TAILS, Assembled
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from networks import images
from pruning import masked
from torch import nn
from torch.nn import functional as F

import singe
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.removal.plan import Plan

LOADER = [images(8, 6, classes=3, seed=seed) for seed in range(2)]
CRITERIA = {
    "magnitude": singe.Magnitude(),
    "integrated gradient": singe.IntegratedGradient(quadrature=singe.GaussLegendre(1)),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def prune(model, rho, criterion):
    """``singe.prune`` without training, by ``rho`` or nearly as much as can go."""
    options = {"criterion": criterion, "finetune": None, "images": 8, "progress": False}
    options |= {"allocation": "uniform", "compensate": "none"}
    try:
        return rho, singe.prune(model, LOADER, rho, **options)
    except ValueError as refusal:
        reach = re.search(r"expected rho <= ([\d.]+)", str(refusal))
        if reach is None:
            raise
        rho = 0.9 * float(reach[1])
        return rho, singe.prune(model, LOADER, rho, **options)


def parameters_without(model, groups, removed):
    plan = Plan()
    for group in groups:
        plan.add(group, removed[group.name])
    return parameters(plan.apply(copy.deepcopy(model)))


def assert_close_to(rho, model, result):
    """Rho is met to within the smallest move of a single neuron, or at least no such move comes closer."""
    groups = [g for g in find_groups(trace(model, LOADER[0][0])) if g.name not in result.frozen]
    removed = {g.name: [] for g in groups} | {r.group: list(r.neurons) for r in result.plan.removals}
    wanted, left = (1 - rho) * result.params_before, result.params_after
    assert parameters_without(model, groups, removed) == left
    others = []
    for group in groups:
        gone = removed[group.name]
        more = [n for n in range(group.size) if n not in gone]
        for other in [gone + more[:1]] * (len(more) > 1) + [gone[1:]] * (len(gone) > 0):
            others.append(parameters_without(model, groups, removed | {group.name: other}))
    within = abs(left - wanted) < min(abs(left - other) for other in others)
    assert within or all(abs(left - wanted) <= abs(other - wanted) + 1e-6 for other in others)


def assert_widths_agree(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            kernel = module.out_channels, module.in_channels // module.groups, *module.kernel_size
            assert module.weight.shape == kernel, name
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features), name
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.shape == (module.num_features,), name


def assert_trains(model):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = LOADER[1]
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.isfinite().all()] == []


def assert_reloads(result, fresh, x):
    with tempfile.TemporaryDirectory() as directory:
        result.save(directory)
        loaded = singe.load(fresh, directory)
    assert torch.equal(loaded.eval()(x), copy.deepcopy(result.model).eval()(x))


def assert_prunes(stages, tail, act, rho, criterion):
    model = Assembled(stages, tail, act)
    before, x = copy.deepcopy(model.state_dict()), LOADER[0][0]
    rho, result = prune(model, rho, criterion)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        actual, expected = result.model(x), masked(model, result.plan)(x)
    assert (actual - expected).norm() <= 1e-4 * expected.norm()
    assert (result.params_before, result.params_after) == (parameters(model), parameters(result.model))
    assert_widths_agree(result.model)
    assert_close_to(rho, model, result)
    assert_trains(result.model)
    assert_reloads(result, Assembled(stages, tail, act), x)
    assert all(result.frozen.values())
    assert not [reason for reason in result.frozen.values() if "trial removal" in reason], result.frozen


stages = st.lists(st.tuples(st.sampled_from(sorted(STAGES)), st.integers(2, 5)), min_size=1, max_size=3)


@settings(  # an export each: no shrinking
    max_examples=3, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(
    stages, st.sampled_from(sorted(TAILS)), st.sampled_from(sorted(ACTIVATIONS)), st.floats(0.05, 0.9),
    st.sampled_from(sorted(CRITERIA)),
)  # fmt: skip
@example([(kind, 3) for kind in STAGES], "flatten", "silu", 0.5, "magnitude")
@example([(kind, 3) for kind in reversed(STAGES)], "mean", "relu6", 0.3, "magnitude")
def test_a_pruned_network_is_the_masked_one_trains_and_reloads(stages, tail, act, rho, criterion):
    assert_prunes(stages, tail, act, rho, CRITERIA[criterion])
