import copy

import pytest
import torch
from networks import DigitNet, Experts, images, randomised
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from wiring import Wired, normal

import singe
from singe import reference
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.refit.equations import Wanted
from singe.refit.regression import RIDGE
from singe.removal.surgery import mask
from singe.scoring.reconstruction import Reconstructor, _System
from singe.task import Task

CRITERION = singe.Reconstruction()


def least(x, z, start, cost, allowed):
    """The least of |X W + b - Z|^2 + cost |W - W_0|^2 where only some rows of W may differ from zero."""
    x, z = x - x.mean(0), z - z.mean(0)
    own = x[:, allowed]
    weights = torch.zeros_like(start)
    squares = own.T @ own + cost * torch.eye(own.shape[1], dtype=x.dtype)
    weights[allowed] = torch.linalg.solve(squares, own.T @ z + cost * start[allowed])
    return (x @ weights - z).square().sum() + cost * (weights - start).square().sum()


def literal(x, reader, per_neuron, gone=()):
    """The criterion as it is written, for a linear reader of x [n, F]: two fits for every neuron that is left."""
    start, z = reader.weight.T, reader(x)
    cost = RIDGE * (x - x.mean(0)).square().sum() / x.shape[1]
    neuron = torch.arange(x.shape[1]) // per_neuron
    left = [n for n in neuron.unique().tolist() if n not in gone]

    def best(removed):
        return least(x, z, start, cost, ~torch.isin(neuron, torch.tensor([*removed], dtype=torch.int64)))

    total = (z - z.mean(0)).square().sum()
    return left, torch.stack([(best([*gone, n]) - best(gone)) / total for n in left])


def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).double().eval()
    return model, normal(60, 5, dtype=torch.float64)


def reconstructor(model, x, name):
    graph = trace(model, x)
    group = next(g for g in find_groups(graph) if g.name == name)
    wanted = Wanted(copy.deepcopy(model), graph, (x, None), Task(), 1 << 30)
    return Reconstructor(model, graph, group, wanted), group


@torch.no_grad()
def test_scores_are_what_the_best_fit_without_the_neuron_costs():
    model, x = setting()
    scorer, group = reconstructor(model, x, "0")
    seen, reader, gone = model[1](model[0](x)), copy.deepcopy(model[2]), []
    for neuron in (3, 0, 5):
        left, expected = literal(seen, reader, 1, gone)
        assert torch.allclose(scorer.scores(CRITERION, torch.tensor(left)), expected, rtol=1e-6, atol=1e-10)
        mask(model, group.slices, torch.tensor([neuron]))
        scorer.forget(neuron)
        gone.append(neuron)


@torch.no_grad()
def test_a_neuron_of_several_columns_goes_with_all_of_them():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    model, x = nn.Sequential(*layers).double().eval(), normal(50, 3, 4, 4, dtype=torch.float64)
    scorer, _ = reconstructor(model, x, "0")
    _, expected = literal(model[:3](x), model[3], 4)
    assert torch.allclose(scorer.scores(CRITERION), expected, rtol=1e-6)


@torch.no_grad()
def test_a_reader_of_several_places_is_fitted_to_all_of_them():
    model = Wired(
        lambda self, x: self.b(self.a(x).relu()) + self.b(self.a(x).tanh()), a=nn.Linear(3, 6), b=nn.Linear(6, 5)
    )
    model, x = model.double().eval(), normal(60, 3, dtype=torch.float64)
    scorer, _ = reconstructor(model, x, "a")
    h = model.a(x)
    _, expected = literal(torch.cat([h.relu(), h.tanh()]), model.b, 1)
    assert torch.allclose(scorer.scores(CRITERION), expected, rtol=1e-6)


def test_a_transposed_reader_scores_as_the_ordinary_one_that_does_the_same():
    torch.manual_seed(0)
    up, same = nn.ConvTranspose1d(4, 6, 3, padding=1, groups=2), nn.Conv1d(4, 6, 3, padding=1, groups=2)
    with torch.no_grad():
        for part in range(2):
            same.weight[3 * part : 3 * part + 3] = up.weight[2 * part : 2 * part + 2].transpose(0, 1).flip(2)
        same.bias.copy_(up.bias)
    first, x = nn.Conv1d(3, 4, 2), normal(30, 3, 9, dtype=torch.float64)
    scores = []
    for reader in (up, same):
        scorer, _ = reconstructor(nn.Sequential(first, nn.Tanh(), reader).double().eval(), x, "0")
        scores.append(scorer.scores(CRITERION))
        scorer.forget(1)
        scores.append(scorer.scores(CRITERION, torch.tensor([0])))
    torch.testing.assert_close(scores[:2], scores[2:])


def test_score_gives_the_same_and_twins_come_first():
    model, x = setting()
    with torch.no_grad():
        for p in model[0].parameters():
            p[4] = p[1]
    scores = singe.score(model, (x, torch.zeros(60, dtype=torch.int64)), "0", criterion="reconstruction")
    scorer, _ = reconstructor(model, x, "0")
    assert torch.equal(scores, scorer.scores(CRITERION))
    assert set(scores.argsort()[:2].tolist()) == {1, 4}
    scorer.forget(1)
    assert scorer.scores(CRITERION, torch.tensor([4])) > 100 * scores[4], "what was there twice is there once"


def test_a_group_whose_readers_cannot_be_fitted_stays_whole_and_says_why():
    def wiring(self, x):
        return self.c(self.d(x)) + self.b(self.b(self.a(x)).relu()).sum(1, keepdim=True)

    layers = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 6), "c": nn.Linear(5, 2), "d": nn.Linear(3, 5)}
    model, x = Wired(wiring, **layers).double().eval(), normal(32, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"of a no reader can be refitted \(b: it reads what it has written itself"):
        reconstructor(model, x, "a")
    loader = DataLoader(TensorDataset(x, torch.zeros(32, dtype=torch.int64)), batch_size=16, shuffle=True)
    options = {"criterion": "reconstruction", "finetune": None, "images": 16, "progress": False}
    result = singe.prune(model, loader, 0.1, compensation_images=32, **options)
    assert [r.group for r in result.history] == ["d"]
    assert result.frozen["a"] == "no reader can be refitted (b: it reads what it has written itself)"


def test_scores_that_overflow_are_refused():
    model, x = setting()
    with torch.no_grad():
        model[0].weight.fill_(1e200)
    with pytest.raises(ValueError, match="scores of 0 are not finite"):
        reconstructor(model, x, "0")[0].scores(CRITERION)


def test_there_is_no_literal_version():
    model, x = setting()
    with pytest.raises(ValueError, match="Reconstruction"):
        reference.score(model, (x, torch.zeros(60, dtype=torch.int64)), "0", criterion="reconstruction")


def test_a_network_pruned_and_compensated_by_it_is_closer_than_by_magnitude():
    model, (x, y) = randomised(DigitNet(6)), images(96, channels=1)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    def lost(criterion):
        result = singe.prune(
            model, loader, 0.5, criterion=criterion, finetune=None, images=32, progress=False,
            compensate="least_squares", compensation_images=96,
        )  # fmt: skip
        return float((result.model.eval()(x) - model.eval()(x)).norm())

    assert lost("reconstruction") < lost("magnitude")


def test_an_expert_that_no_sample_reaches_costs_nothing():
    model, x = Experts(), normal(40, 6)
    scores = {number: reconstructor(model, x, f"experts.{number}.0")[0].scores(CRITERION) for number in (1, 2)}
    assert scores[1].any() and torch.equal(scores[2], torch.zeros(12, dtype=torch.float64))


def test_what_is_gone_leaves_the_system():
    x = normal(60, 12, dtype=torch.float64)
    squares = x.T @ x + torch.eye(12, dtype=torch.float64)
    system = _System(torch.arange(12).view(6, 2), squares.inverse(), normal(12, 3, dtype=torch.float64), 1.0)
    for neuron in (1, 4):
        system.remove(neuron)
    left = torch.tensor([0, 2, 3, 5])
    columns = torch.tensor([0, 1, 4, 5, 6, 7, 10, 11])
    assert len(system.inverse) == 8 and torch.equal(system.columns[left], torch.arange(8).view(4, 2))
    torch.testing.assert_close(system.inverse, squares[columns[:, None], columns].inverse())
