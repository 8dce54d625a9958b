import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import DigitNet, randomised
from wiring import groups_of, normal

from singe.scoring.rounds import channels, comparable, least

GROUPS = groups_of(randomised(DigitNet(4)).eval(), normal(2, 1, 8, 8))
ABLE = {name: group for name, group in GROUPS.items() if group.frozen is None}


def ranked(seed, gone):
    """Random scores of every group, with some neurons masked in each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: comparable(torch.rand(g.size, generator=generator, dtype=torch.float64), range(min(gone, g.size)))
        for name, g in ABLE.items()
    }


@given(seed=st.integers(0, 100), gone=st.integers(0, 4), room=st.integers(0, 60))
def test_the_least_of_all_groups_go_as_far_as_there_is_room(seed, gone, room):
    scores = ranked(seed, gone)
    taken = least(ABLE, scores, room)
    spent = sum(len(neurons) * channels(ABLE[name]) for name, neurons in taken.items())
    assert spent <= room
    dearest = max((scores[name][n].item() for name, neurons in taken.items() for n in neurons), default=-math.inf)
    for name, s in scores.items():
        neurons = taken.get(name, [])
        left = int(s.isfinite().sum()) - len(neurons)
        assert left >= min(1, int(s.isfinite().sum()))
        assert s[neurons].isfinite().all()
        assert neurons == s.argsort(stable=True)[: len(neurons)].tolist()
        # what stays though it is less relevant found no room, or is the last of its group
        if left > 1 and s[[n for n in range(len(s)) if n not in neurons]].min() < dearest:
            assert channels(ABLE[name]) > 1
        if left > 1:
            assert channels(ABLE[name]) > room - spent


def test_a_coupled_neuron_owns_a_channel_of_each_layer_that_writes_it():
    assert {name: channels(g) for name, g in ABLE.items()} == {
        name: sum(len(g.written(w).neuron) for w in g.writers) // g.size for name, g in ABLE.items()
    }
    assert max(map(channels, ABLE.values())) > 1


def test_groups_become_comparable_by_their_norm_and_what_is_masked_counts_for_nothing():
    scores = torch.tensor([3.0, 100.0, 4.0, 0.0], dtype=torch.float64)
    assert comparable(scores, [1]).tolist() == [0.6, math.inf, 0.8, 0.0]
    assert scores[1] == 100
    assert comparable(torch.zeros(3), [2]).tolist() == [0, 0, math.inf]
