import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from networks import MLP, DigitNet, PlainNet, PreActNet, images, randomised
from torch import nn
from torch.nn import functional as F

import singe
from singe import reference
from singe.criteria import WeightCriterion
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.memory import limit
from singe.removal.surgery import mask
from singe.scoring.engine import Engine
from singe.scoring.passes import Passes
from singe.task import Task

CRITERIA = [
    singe.Magnitude(),
    singe.IntegratedGradient(quadrature=singe.GaussLegendre(2)),
    singe.SummedGradient(quadrature=singe.GaussLegendre(2), path="layer"),
    singe.LossChange(),
]


class Setting:
    """A network in float64, its graph, one of its groups by name, and a batch."""

    def __init__(self, model, batch, group):
        self.model, self.batch = model, (batch[0].to(next(model.parameters()).dtype), batch[1])
        self.graph = trace(model, self.batch[0])
        self.group = next(g for g in find_groups(self.graph) if g.name == group)

    def engine(self, **options):
        return Engine(self.model, self.graph, self.group, self.batch, **options)

    def loss(self):
        with torch.no_grad():
            return float(F.cross_entropy(self.model(self.batch[0]), self.batch[1]))


SETTINGS = {
    "plain conv": (PlainNet, images, "features.0"),
    "no bias, no affine": (PlainNet, images, "features.4"),
    "linear": (PlainNet, images, "classifier.0"),
    "coupled": (lambda: DigitNet(3), lambda: images(channels=1), "stem"),
    "coupled by a shortcut": (lambda: DigitNet(3), lambda: images(channels=1), "blocks.1.conv2"),
    "shifts in the suffix": (PreActNet, images, "stem"),
    "shift behind one layer": (PreActNet, images, "conv1"),
    "sequences": (MLP, lambda: (images(3, 10, 1)[0][:, 0], images(3)[1]), "layers.0"),
}


@pytest.fixture(params=SETTINGS, scope="module")
def setting(request):
    make, data, group = SETTINGS[request.param]
    return Setting(randomised(make()).double(), data(), group)


def close(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    assert expected.norm() > 0
    return float((actual - expected).norm() / expected.norm()) <= tolerance


def spearman(a, b):
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


# -- removals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def after_removals(setting):
    """An engine that has seen neurons 2 and 0 go, one that comes to the masked model anew, and those left."""
    kept = copy.deepcopy(setting.model.state_dict())
    engine = setting.engine()
    for neuron in (2, 0):
        mask(setting.model, setting.group.slices, torch.tensor([neuron]))
        engine.forget(neuron)
    yield engine, setting.engine(), torch.tensor([n for n in range(setting.group.size) if n not in (0, 2)])
    setting.model.load_state_dict(kept)


def test_after_masking_and_forgetting_scores_are_those_of_a_fresh_engine(setting, after_removals):
    engine, fresh, _ = after_removals
    for criterion in CRITERIA[:-1]:
        scores = engine.scores(criterion)
        assert close(scores, fresh.scores(criterion)), criterion
        assert (scores[[0, 2]].abs() < 1e-12).all(), criterion  # what is gone has no relevance


def test_after_masking_and_forgetting_loss_change_is_that_of_one_more_removal(setting, after_removals):
    engine, fresh, _ = after_removals
    assert close(engine.scores(singe.LossChange()), fresh.scores(singe.LossChange()))


def test_a_masked_model_scores_as_in_the_reference(setting, after_removals, one_export):
    _, fresh, left = after_removals
    for criterion in CRITERIA[1:]:
        expected = reference.score(setting.model, setting.batch, setting.group.name, criterion=criterion)
        assert close(fresh.scores(criterion)[left], expected[left]), criterion


def test_loss_change_is_the_change_when_the_neuron_is_masked(setting):
    model, base = setting.model, setting.loss()
    changes = setting.engine().scores(singe.LossChange())
    for neuron in (0, setting.group.size - 1):
        kept = copy.deepcopy(model.state_dict())
        mask(model, setting.group.slices, torch.tensor([neuron]))
        assert float(changes[neuron]) == pytest.approx(setting.loss() - base, abs=1e-12)
        model.load_state_dict(kept)


def test_loss_is_the_models_loss(setting):
    assert setting.engine().loss == pytest.approx(setting.loss(), rel=1e-12)


# -- which neurons, how much memory ------------------------------------------------------------------------------


def test_some_neurons_in_any_order_score_as_among_all(setting):
    engine, some = setting.engine(), torch.tensor([2, 0])
    for criterion in CRITERIA:
        assert close(engine.scores(criterion, some), engine.scores(criterion)[some]), criterion


@pytest.mark.parametrize("memory", [1, 1 << 15, 1 << 40])
def test_memory_sets_how_much_runs_at_once_and_not_what_comes_out(setting, memory):
    evaluated = []

    def loss(outputs, batch):
        evaluated.append(len(outputs))
        return F.cross_entropy(outputs, batch[1])

    engine = setting.engine(task=Task(loss=loss), memory=memory)
    expected = setting.engine()
    assert expected.parts == 1 < expected.chunk
    if memory == 1:
        assert (engine.parts, engine.chunk) == (len(setting.batch[0]), 1)
    for criterion in CRITERIA:
        evaluated.clear()
        assert close(engine.scores(criterion), expected.scores(criterion)), criterion
        assert set(evaluated) <= {len(setting.batch[0])}  # the loss is always that of the whole batch
    if memory == 1 << 40:
        assert engine.chunk >= setting.group.size


def with_room_for(monkeypatch, samples, error):
    """Passes of more samples than that fail, as on a device that is full."""
    forward = Passes._forward

    def limited(self, jobs, part):
        if len(jobs) * part.size > samples:
            raise error
        return forward(self, jobs, part)

    monkeypatch.setattr(Passes, "_forward", limited)


SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[...] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize(("error", "samples"), [(SHORTAGES[0], 8), (SHORTAGES[1], 2)], ids=["cuda", "cpu"])
def test_where_the_device_has_no_room_passes_get_smaller(setting, monkeypatch, caplog, error, samples):
    expected = [setting.engine().scores(criterion) for criterion in CRITERIA]
    with_room_for(monkeypatch, samples, error)
    engine = setting.engine()
    for criterion, whole in zip(CRITERIA, expected, strict=True):
        assert close(engine.scores(criterion), whole), criterion
    assert engine.chunk * len(setting.batch[0]) <= samples or engine.parts > 1
    assert 0 < engine.memory < limit(None, torch.device("cpu"))
    assert f"{setting.group.name}: out of memory, passes may take {engine.memory} bytes" in caplog.messages[-1]


def test_neurons_that_are_gone_stay_so_when_passes_get_smaller(setting, monkeypatch):
    engine, copy_of = setting.engine(), copy.deepcopy(setting.model)
    mask(setting.model, setting.group.slices, torch.tensor([1]))
    try:
        engine.forget(1)
        expected = engine.scores(CRITERIA[1])
        with_room_for(monkeypatch, 8, SHORTAGES[0])
        assert close(engine.scores(CRITERIA[1]), expected)
    finally:
        setting.model.load_state_dict(copy_of.state_dict())


def test_where_there_is_no_room_at_all_the_error_is_the_devices_own(setting, monkeypatch):
    with_room_for(monkeypatch, 0, SHORTAGES[0])
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        setting.engine().scores(singe.LossChange())


def test_other_errors_are_not_taken_for_a_shortage(setting, monkeypatch, caplog):
    with_room_for(monkeypatch, 0, RuntimeError("some kernel failed"))
    with pytest.raises(RuntimeError, match="some kernel failed"):
        setting.engine().scores(singe.LossChange())
    assert "out of memory" not in caplog.text


# -- completeness ------------------------------------------------------------------------------------------------


def loss_regained(setting, neuron, nodes):
    """The integral over the neuron's path of <dL/d(t theta), theta> dt, the slope of the loss along the path."""
    literal = reference._Literal(setting.model, setting.graph, setting.group, setting.batch, Task())
    total = 0.0
    for t, weight in zip(*singe.GaussLegendre(nodes).dt(), strict=True):
        t.requires_grad_()
        (slope,) = torch.autograd.grad(literal._value(literal._faded([neuron], t)), t)
        total += float(weight * slope)
    return total


def test_fading_out_and_removal_cost_the_same_loss(setting):
    folded = Setting(copy.deepcopy(setting.model), setting.batch, setting.group.name)
    reference.fold(folded.model, folded.graph)
    folded = Setting(folded.model, folded.batch, folded.group.name)
    change = setting.engine().scores(singe.LossChange())
    tolerance = 0.02 * float(change.abs().max())
    for neuron in (0, setting.group.size - 1):
        assert loss_regained(folded, neuron, 64) == pytest.approx(-float(change[neuron]), abs=tolerance)


def test_fading_out_and_removal_cost_the_same_loss_to_many_digits_in_a_smooth_network():
    layers = nn.Conv2d(3, 6, 3, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(54, 4), nn.Tanh(), nn.Linear(4, 4)
    setting = Setting(randomised(nn.Sequential(*layers)).double(), images(), "0")
    change = setting.engine().scores(singe.LossChange())
    assert loss_regained(setting, 2, 24) == pytest.approx(-float(change[2]), rel=1e-6)


@pytest.fixture(scope="module")
def in_trained(trained, digit_batch):
    """(group, images) -> an engine on some digits, one export for all."""
    setting = Setting(trained, digit_batch, "stem")
    groups = {g.name: g for g in find_groups(setting.graph)}
    return lambda group, images=32: Engine(
        setting.model, setting.graph, groups[group], tuple(v[:images] for v in setting.batch)
    )


@pytest.mark.parametrize("group", ["blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1"])
def test_four_gauss_legendre_nodes_rank_like_the_papers_91_steps(in_trained, group):
    engine, some = in_trained(group), torch.arange(16)
    few = engine.scores(singe.IntegratedGradient(quadrature=singe.GaussLegendre(4)), some)
    many = engine.scores(singe.IntegratedGradient(quadrature=singe.Geometric(0.95)), some)
    assert spearman(few, many) >= 0.98
    assert ((1 - 0.95) * many / few - 1).abs().median() < 0.05  # one integral, in two scales


def test_the_neuron_path_predicts_removals_and_is_not_the_layer_path(in_trained):
    engine = in_trained("blocks.1.conv1")
    change = engine.scores(singe.LossChange())
    neuron, layer = (engine.scores(singe.IntegratedGradient(path=path)) for path in ("neuron", "layer"))
    assert spearman(neuron, change) > 0.5
    assert spearman(neuron, layer) < 0.98


# -- what cannot be stacked --------------------------------------------------------------------------------------


class Mixing(MLP):
    """Every sample sees its neighbour's hidden values."""

    def forward(self, x):
        y = self.layers[:2](x)
        return self.layers[2:](y + y.roll(1, 0))


def test_samples_that_see_each_other_run_job_by_job_and_the_log_says_so(caplog):
    x, y = images(3, 10, 1)[0][:, 0, 0], images(3)[1]
    with caplog.at_level(logging.WARNING, "singe"):
        Setting(randomised(MLP()), (x, y), "layers.0").engine().scores(singe.LossChange())
        assert not caplog.records
        behind = Setting(randomised(Mixing()), (x, y), "layers.2")  # they meet in front of this layer
        behind.engine().scores(singe.LossChange())
        assert not caplog.records
        engine = Setting(randomised(Mixing()), (x, y), "layers.0").engine()
        engine.scores(singe.LossChange())
    assert "layers.0" in caplog.text
    assert engine.chunk == 1


def test_a_criterion_that_gives_what_is_not_finite_is_named():
    @dataclass(frozen=True)
    class Odd(WeightCriterion):
        def of_rows(self, rows):
            return rows.sum(1) * torch.nan

    setting = Setting(randomised(PlainNet()), images(), "features.0")
    with pytest.raises(ValueError, match=r"scores of features\.0 are not finite: .*Odd\(\) gives others"):
        setting.engine().scores(Odd())


def test_a_loss_that_is_not_finite_is_refused():
    x, y = images(3, 10, 1)[0][:, 0, 0], images(3)[1]
    setting = Setting(randomised(MLP()), (x, y), "layers.0")
    engine = setting.engine(task=Task(loss=lambda o, b: o.sum() * torch.inf))
    with pytest.raises(ValueError, match=r"finite loss.*inf"):
        assert engine.loss
    engine = setting.engine(task=Task(loss=lambda o, b: (o - o.detach()).sum().sqrt()))  # 0, with an infinite slope
    with pytest.raises(ValueError, match=r"layers\.0.*not finite"):
        engine.scores(singe.Gradient())


# -- fading curves -----------------------------------------------------------------------------------------------


class At:
    """A quadrature of one node."""

    def __init__(self, t):
        self.t = t

    def log_dt(self):
        return torch.tensor([self.t], dtype=torch.float64), torch.ones(1, dtype=torch.float64)

    dt = log_dt


def test_a_fading_curve_is_the_norm_of_the_gradient_at_its_points(setting):
    engine, t = setting.engine(), torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    neuron = int(engine.scores(singe.SummedGradient()).argmax())
    at = [singe.SummedGradient(quadrature=At(float(point))) for point in t]
    expected = torch.cat([engine.scores(criterion, torch.tensor([neuron])) for criterion in at])
    assert close(engine.fading(neuron, t, 2), expected)
    assert close(setting.engine(memory=1).fading(neuron, t, 2), expected)  # image by image


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_removals_add_up_as_if_made_at_once(dtype):
    wide = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 4))
    x, y = torch.randn(16, 6, dtype=dtype), torch.arange(16) % 4
    setting = Setting(randomised(wide).to(dtype), (x, y), "0")
    engine = setting.engine()
    engine.scores(singe.LossChange())
    for neuron in range(240):
        mask(setting.model, setting.group.slices, torch.tensor([neuron]))
        engine.forget(neuron)
        if neuron % 8 == 0:
            engine.loss  # noqa: B018 - brings the caches up to date
    left = torch.arange(240, 256)
    found, fresh = (e.scores(singe.LossChange(), left) for e in (engine, setting.engine()))
    assert (found - fresh).norm() < 0.1 * fresh.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_neurons_rank_as_in_single(dtype):
    ranks = {}
    for kind in (torch.float32, dtype):
        setting = Setting(randomised(PlainNet()).to(kind), images(), "features.0")
        ranks[kind] = setting.engine().scores(singe.LossChange())
    assert len(ranks[dtype].unique()) == setting.group.size
    assert torch.corrcoef(torch.stack([*ranks.values()]))[0, 1] > 0.95
