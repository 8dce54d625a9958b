import pytest
import torch

import singe
from singe.scoring.selection import Selection


class FakeEngine:
    """Scores by a rule (removed so far, neuron) -> number, and remembers what it was asked."""

    def __init__(self, size, rule, lasts=False):
        self.size, self.rule, self.removed, self.asked, self.lasts = size, rule, [], [], lasts

    def lasting(self, criterion):
        return self.lasts

    def scores(self, criterion, neurons=None):
        wanted = list(range(self.size)) if neurons is None else neurons.tolist()
        self.asked.append(wanted)
        return torch.tensor([float(self.rule(tuple(self.removed), n)) for n in wanted], dtype=torch.float64)


def run(rule, size, count, refresh, criterion=None):
    engine = FakeEngine(size, rule)
    selection = Selection(engine, criterion or singe.IntegratedGradient(), refresh)
    for _ in range(count):
        engine.removed.append(selection.take_least())
    assert selection.taken == engine.removed
    assert selection.scored == sum(map(len, engine.asked))
    return selection, engine


def brute_force(rule, size, count):
    removed, scores = [], []
    for _ in range(count):
        score, neuron = min((rule(tuple(removed), n), n) for n in range(size) if n not in removed)
        removed.append(neuron)
        scores.append(score)
    return removed, scores


def random_start(size, seed):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def growing(size, seed):
    """Scores that only grow, each at its own rate."""
    start, rate = random_start(size, seed), random_start(size, seed + 1000)
    return lambda removed, n: start[n] + 0.3 * rate[n] * len(removed)


def changing(size, seed):
    """Scores that have nothing to do with what they were."""
    return lambda removed, n: random_start(size, seed + 31 * sum((r + 1) ** 2 for r in removed))[n]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rules", [growing, changing])
def test_full_is_the_loop_that_rescores_everything(rules, seed):
    rule = rules(12, seed)
    selection, engine = run(rule, 12, 9, "full")
    assert (selection.taken, selection.taken_scores) == brute_force(rule, 12, 9)
    assert [len(asked) for asked in engine.asked] == list(range(12, 3, -1))


@pytest.mark.parametrize("seed", range(5))
def test_lazy_is_full_with_fewer_scores_where_scores_only_grow(seed):
    rule = growing(30, seed)
    full, _ = run(rule, 30, 20, "full")
    lazy, engine = run(rule, 30, 20, "lazy")
    assert (lazy.taken, lazy.taken_scores) == (full.taken, full.taken_scores)
    assert lazy.scored < full.scored / 2
    assert all(len(asked) == 1 for asked in engine.asked[1:])


def test_lazy_scores_one_neuron_a_removal_where_scores_stay():
    lazy, engine = run(lambda removed, n: (7 * n) % 10, 10, 10, "lazy")
    assert lazy.taken == sorted(range(10), key=lambda n: (7 * n) % 10)
    assert lazy.scored == 10 + 9
    assert engine.asked[1:] == [[n] for n in lazy.taken[1:]]


def test_lazy_never_takes_a_stale_score():
    rule = changing(12, 3)
    lazy, _ = run(rule, 12, 9, "lazy")
    for i, (neuron, score) in enumerate(zip(lazy.taken, lazy.taken_scores, strict=True)):
        assert score == rule(tuple(lazy.taken[:i]), neuron)


@pytest.mark.parametrize("criterion", [singe.Gradient(), singe.IntegratedGradient(path="layer")])
def test_lazy_rescores_all_where_one_pass_scores_all_anyway(criterion):
    rule = changing(12, 4)
    selection, engine = run(rule, 12, 6, "lazy", criterion)
    assert selection.taken == brute_force(rule, 12, 6)[0]
    assert [len(asked) for asked in engine.asked] == list(range(12, 6, -1))


@pytest.mark.parametrize("refresh", ["lazy", "full"])
def test_negative_scores_go_first_and_nothing_goes_twice(refresh):
    selection, _ = run(lambda removed, n: n - 3.0, 6, 6, refresh, singe.LossChange())
    assert selection.taken == [0, 1, 2, 3, 4, 5]
    assert selection.taken_scores == [-3, -2, -1, 0, 1, 2]


@pytest.mark.parametrize("refresh", ["lazy", "full"])
def test_after_a_renewal_the_new_engine_is_asked(refresh):
    old, new = FakeEngine(5, lambda removed, n: n), FakeEngine(5, lambda removed, n: 10 + n)
    selection = Selection(old, singe.IntegratedGradient(), refresh)
    assert selection.take_least() == 0
    selection.renew(new)
    assert selection.scorer is new
    assert selection.take_least() == 1
    assert len(old.asked) == 1
    assert selection.taken_scores == [0, 11]


@pytest.mark.parametrize("refresh", ["lazy", "full"])
def test_scores_that_last_are_computed_once(refresh):
    engine = FakeEngine(5, lambda removed, n: (n * 3) % 5, lasts=True)
    selection = Selection(engine, singe.Magnitude(), refresh)
    assert [selection.take_least() for _ in range(4)] == [0, 2, 4, 1]
    assert engine.asked == [list(range(5))]
    selection.renew(engine)
    assert selection.take_least() == 3 and engine.asked[1:] == [[3]]


def test_scores_that_last_get_no_fresher_by_a_removal():
    selection = Selection(FakeEngine(3, lambda removed, n: n, lasts=True), singe.LossChange(), "lazy")
    selection.renew(FakeEngine(3, lambda removed, n: (0, 9, 3)[n], lasts=True))
    assert [selection.take_least() for _ in range(3)] == [0, 2, 1]
