import pytest
import torch
from networks import PlainNet, images, randomised

from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.removal.surgery import mask
from singe.scoring.prefix import Prefix


def setting(layer="features.4", channels_last=False):
    model, (x, _) = randomised(PlainNet()).eval(), images(6)
    graph = trace(model, x)
    group = next(g for g in find_groups(graph) if g.name == layer)
    return model, group, Prefix(model, graph, group, x, channels_last)


def node_of(prefix, name):
    return next(node for node, known in prefix._trace.state.items() if known == name)


def test_values_of_some_images_are_those_of_all():
    _, _, prefix = setting()
    whole, parts = prefix.values(0, 6), [prefix.values(0, 2), prefix.values(2, 4)]
    assert whole.keys() == set(prefix.down.kept)
    for node, value in whole.items():
        torch.testing.assert_close(torch.cat([part[node] for part in parts]), value)


@pytest.mark.parametrize("layer", ["features.0", "features.4"])
def test_masked_neurons_are_seen_once_it_is_refreshed(layer):
    model, group, prefix = setting(layer)
    mask(model, group.slices, torch.tensor([1]))
    prefix.refresh()
    anew = Prefix(model, prefix._trace, group, images(6)[0], channels_last=False)
    assert all(torch.equal(value, anew.live[node]) for node, value in prefix.live.items())
    for call, pair in prefix.folded.items():
        assert all(map(torch.equal, pair, anew.folded[call]))
    assert prefix.live[node_of(prefix, f"{layer}.weight")][1].eq(0).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_kernels_are_in_the_format_that_is_fastest(channels_last):
    _, _, prefix = setting(channels_last=channels_last)
    kernels = [v for v in prefix.live.values() if v.dim() == 4 and v.shape[2] > 1]
    assert kernels and all(v.is_contiguous(memory_format=torch.channels_last) == channels_last for v in kernels)


def test_layers_run_with_the_batch_norm_behind_them_where_it_is_folded():
    _, _, prefix = setting("features.0")
    assert prefix.down.foldable
    for call in prefix.down.foldable:
        assert prefix.weights(call) is prefix.folded[call]
    weight = node_of(prefix, "features.7.weight")  # no batch norm follows
    (call,) = weight.users
    assert prefix.weights(call) == (prefix.live[weight], prefix.live[node_of(prefix, "features.7.bias")])
