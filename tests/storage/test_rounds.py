import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from singe.records import RoundRecord
from singe.storage.rounds import read, state_of

SETTINGS, SIZES = {"every": 2, "score": "Random()"}, {"first": 9, "second": 5}
numbers = st.floats(allow_nan=False)


@st.composite
def histories(draw):
    """Rounds of which no two remove the same neuron, and none the last of a group."""
    left = {name: draw(st.permutations(range(size)))[1:] for name, size in SIZES.items()}
    history = []
    for epoch in range(2, 2 * draw(st.integers(0, 4)) + 1, 2):
        removed = {}
        for name in draw(st.sets(st.sampled_from(sorted(SIZES)))):
            count = draw(st.integers(0, len(left[name])))
            removed[name], left[name] = tuple(left[name][:count]), left[name][count:]
        scores = {name: tuple(draw(numbers) for _ in neurons) for name, neurons in removed.items()}
        losses = draw(numbers), draw(numbers), draw(st.floats(0, 9)), draw(st.none() | numbers)
        history.append(RoundRecord(epoch, removed, scores, 3, *losses, evaluation_removed=None))
    return history


@given(histories())
def test_a_state_that_went_through_a_file_comes_back(history):
    file = io.BytesIO()
    torch.save(state_of(SETTINGS, SIZES, 8, history), file)
    file.seek(0)
    assert read(torch.load(file, weights_only=True), SETTINGS, SIZES) == (8, history)


@pytest.mark.parametrize(
    ("settings", "sizes", "said"),
    [
        (SETTINGS | {"every": 3}, SIZES, "of the same settings, but every was 2 and is 3"),
        (SETTINGS, SIZES | {"second": 6}, "of a model with the groups"),
        (SETTINGS | {"until": 3}, SIZES, "what GradualPruner.state_dict returns, got something else"),
    ],
)
def test_a_state_of_another_pruner_is_refused(settings, sizes, said):
    with pytest.raises(ValueError, match=said):
        read(state_of(SETTINGS, SIZES, 1, []), settings, sizes)


def test_a_neuron_goes_only_once():
    twice = RoundRecord(2, {"first": (3, 3)}, {"first": (0.1, 0.2)}, 2, 1.0, math.pi, 0.5)
    with pytest.raises(ValueError, match="expected different neurons of first"):
        read(state_of(SETTINGS, SIZES, 2, [twice]), SETTINGS, SIZES)
