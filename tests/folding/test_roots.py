import pytest
import torch
from torch import nn
from wiring import Wired, normal

from singe.folding.flow import find_channels
from singe.folding.roots import Unfoldable, _solved, change_without
from singe.graph.batchnorm import affine_of
from singe.graph.trace import trace


def network():
    """A batch norm with a root, a leaf, and a layer that has nothing to do with it."""

    def wiring(self, x):
        u = self.root(x)
        return self.other(self.n(u).relu()) + self.leaf(u)

    linear = nn.Linear
    model = Wired(wiring, root=linear(3, 4), n=nn.BatchNorm1d(4), leaf=linear(4, 2), other=linear(4, 2)).double()
    return model, find_channels(trace(model, normal(2, 3, dtype=torch.float64)), {})


def test_roots_get_what_the_batch_norm_does_and_leaves_undo_it():
    model, channels = network()
    affine = affine_of(model.n)
    change = change_without(channels, "n", affine)
    layers = {layer.name: layer for layer in channels.layers}
    assert [name for name, layer in layers.items() if name != "n" and change.concerns(layer)] == ["root", "leaf"]
    root, leaf = layers["root"].writes, layers["leaf"].reads
    torch.testing.assert_close(change.scale[root], affine.scale)
    torch.testing.assert_close(change.shift[root], affine.shift)
    x = normal(4, dtype=torch.float64)
    changed = change.scale[root] * x + change.shift[root]
    torch.testing.assert_close(change.factor[leaf] * changed - change.offset[leaf], x)


def test_a_batch_norm_that_is_gone_holds_nothing_up():
    _, channels = network()
    channels.fold("n")
    assert channels.norms == {} and [layer.name for layer in channels.layers] == ["root", "other", "leaf"]
    classes = channels.classes()
    root = channels.layers[0].writes
    kept = [o for o in channels.obstacles if torch.isin(classes.scale[o.channels], classes.scale[root]).any()]
    assert [o.what for o in kept] == ["aten.relu.default"]


def test_layers_that_cannot_change_are_obstacles():
    model, _ = network()
    graph = trace(model, normal(2, 3, dtype=torch.float64))
    (call,) = graph.calls("leaf.weight")
    channels = find_channels(graph, {call: "the leaf"})
    with pytest.raises(Unfoldable, match=r"before it comes the leaf; after it comes aten\.relu"):
        change_without(channels, "n", affine_of(model.n))


def solved(sums, total, size, fixed=()):
    terms = torch.tensor([[place for place, _ in s] for s in sums])
    coefficients = torch.tensor([[c for _, c in s] for s in sums], dtype=torch.float64)
    zero = torch.zeros(size, dtype=torch.bool)
    zero[[0, *fixed]] = True
    value = _solved(terms, coefficients, torch.tensor(total, dtype=torch.float64), zero)
    if value is not None:
        assert torch.equal((coefficients * value[terms]).sum(1), torch.tensor(total, dtype=torch.float64))
        assert not value[zero].any()
    return value


def test_values_are_zero_where_they_may():
    sums = [[(1, 1), (2, -1), (0, 0)], [(1, -1), (3, 1), (4, 1)], [(5, -1), (3, 2), (0, 0)]]
    assert solved(sums, [6, 0, 0], 7).tolist() == [0, 6, 0, 6, 0, 12, 0]


def test_values_that_must_be_zero_push_others_on():
    sums = [[(1, 1), (2, -1), (0, 0)], [(1, -1), (3, 1), (4, 1)], [(5, -1), (3, 1), (0, 0)]]
    assert solved(sums, [6, 0, 0], 6, [5]).tolist() == [0, 6, 0, 0, 6, 0]
    assert solved(sums, [6, 0, 0], 6, [5, 4]).tolist() == [0, 0, -6, 0, 0, 0]
    assert solved(sums, [6, 0, 0], 6, [5, 4, 2]) is None


def test_one_value_serves_several_sums():
    sums = [[(1, 1), (0, 0), (0, 0)], [(1, -1), (2, 1), (3, 1)], [(1, -1), (2, 1), (4, 1)]]
    assert solved(sums, [3, 0, 0], 5).tolist() == [0, 3, 3, 0, 0]
