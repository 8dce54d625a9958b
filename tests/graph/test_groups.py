import pytest
import torch
from networks import ExciteNet, images, randomised

from singe.graph.analysis import find_groups
from singe.graph.groups import Group, Slice, module_of, rows_by_neuron
from singe.graph.trace import trace


@pytest.fixture
def group():
    slices = (
        Slice("a.weight", 0, torch.tensor([0, 1, -1, 2]), "writes"),
        Slice("a.bias", 0, torch.tensor([0, 1, -1, 2]), "writes"),
        Slice("b.c.weight", 0, torch.tensor([2, 0, 1]), "writes"),
        Slice("head.weight", 1, torch.tensor([-1, 0, 0, 2, 1, 2, 1]), "reads"),
    )
    return Group("a", 3, ("a.weight", "b.c.weight"), slices, None)


def test_a_slice_gives_the_indices_of_neurons_in_ascending_order(group):
    head = group.read("head.weight")
    assert head.multiplicity == 2
    assert head.indices(torch.tensor([2, 0])).tolist() == [1, 2, 3, 5]
    assert head.indices(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_rows_are_listed_neuron_by_neuron(group):
    assert group.rows("a.weight").tolist() == [[0], [1], [3]]
    assert group.rows("b.c.weight").tolist() == [[1], [2], [0]]
    assert rows_by_neuron(group.read("head.weight").neuron, 3).tolist() == [[1, 2], [4, 6], [3, 5]]


def test_a_tensor_that_does_not_write_or_read_a_group_is_named(group):
    with pytest.raises(KeyError, match=r"a is not written by head\.weight"):
        group.written("head.weight")
    with pytest.raises(KeyError, match=r"a is not read by a\.weight"):
        group.read("a.weight")


def test_members_are_the_modules_that_hold_rows(group):
    assert group.members == ("a", "b.c")
    assert module_of("weight") == ""


def test_readers_are_the_weights_whose_columns_go():
    groups = {g.name: g for g in find_groups(trace(randomised(ExciteNet()), images()[0]))}
    assert groups["expand"].readers == ("fc1.weight", "conv.weight")
    assert groups["head"].readers == ()
