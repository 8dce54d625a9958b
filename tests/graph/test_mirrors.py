import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from singe.graph.mirrors import NOBODY, along, collapsed, lie_along, linked, pairs, representative, tidied, varies


@st.composite
def mirrors(draw):
    """Ids of few neurons over [a, b, c], some axes expanded."""
    shape = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    written = [draw(st.booleans()) for _ in shape]
    sizes = [size if own else 1 for size, own in zip(shape, written, strict=True)]
    count = torch.Size(sizes).numel()
    ids = draw(st.lists(st.integers(NOBODY, 3), min_size=count, max_size=count))
    return torch.tensor(ids).view(sizes).expand(shape)


@settings(max_examples=200, deadline=None)
@given(mirrors())
def test_an_axis_varies_where_two_owners_differ(owners):
    for axis in range(owners.dim()):
        lines = owners.movedim(axis, 0).flatten(1).T.tolist()
        assert varies(owners, axis) == any(len(set(line) - {NOBODY}) > 1 for line in lines)


@settings(max_examples=200, deadline=None)
@given(mirrors())
def test_a_tidied_mirror_is_the_same_and_repeats_what_it_can(owners):
    tidy = tidied(owners)
    assert torch.equal(tidy, owners)
    for axis, size in enumerate(owners.shape):
        equal = all(torch.equal(owners.select(axis, 0), owners.select(axis, i)) for i in range(size))
        assert size == 1 or (tidy.stride(axis) == 0) == equal


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_linked_ids_share_their_smallest(links):
    label = linked(torch.arange(10), torch.tensor(links, dtype=torch.int64).view(-1, 2).T)
    expected = list(range(10))
    for a, b in links:
        low, high = sorted((expected[a], expected[b]))
        expected = [low if e == high else e for e in expected]
    assert label.tolist() == expected


def test_pairs_are_what_differs_and_belongs_to_somebody():
    a, b = torch.tensor([1, 2, NOBODY, 4, 2]), torch.tensor([1, 3, 5, NOBODY, 3])
    assert pairs(a, b).tolist() == [[2], [3]]
    assert pairs(a, a).shape == (2, 0)


def test_axes_along_which_values_repeat_shrink():
    a = torch.arange(3).view(1, 3, 1).expand(2, 3, 4)
    b = torch.zeros(2, 1, 1).expand(2, 3, 4)
    assert [t.shape for t in collapsed(a)] == [(1, 3, 1)]
    assert [t.shape for t in collapsed(a, b)] == [(2, 3, 1)] * 2


def test_values_lie_along_one_axis():
    assert along(torch.arange(3), 1, 4).shape == (1, 3, 1, 1) and along(torch.arange(3), -1, 2).shape == (1, 3)


def test_constants_differ_from_nobody():
    picture = torch.tensor([1, 2, 3]).view(3, 1).expand(3, 4).clone()
    picture[:, 0] = NOBODY
    assert lie_along(picture, 0)
    assert not lie_along(picture, 1), "positions of one neuron, with padding around"


def test_nobody_stands_for_an_axis_without_elements():
    assert representative(torch.ones(2, 0, 3, dtype=torch.int64), [1]).tolist() == [[[NOBODY] * 3]] * 2


def test_a_neuron_may_lie_at_several_places_of_an_axis():
    rows = torch.tensor([5, 6, 5, 6])
    picture = rows[:, None].expand(4, 3).clone()
    assert lie_along(picture, 0, repeated=True) and not lie_along(picture, 0) and not lie_along(picture, 1)
    assert not lie_along(torch.tensor([[5, 6], [6, 7]]), 0, repeated=True), (
        "neurons that lie neither along one axis nor the other"
    )
