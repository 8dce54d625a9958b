import pytest
import torch
from networks import images, randomised
from torch import nn
from wiring import Wired, normal

from singe.graph import batchnorm
from singe.graph.analysis import find_groups
from singe.graph.groups import module_of
from singe.graph.layer import find_layers, layer_at
from singe.graph.trace import trace


def planes(self, x):
    y = torch.relu(self.bn1(self.a(x)))  # [B, 4, 4, 8]
    y = torch.relu(self.bn2(self.same(y)))  # [B, 6, 4, 8]
    y = torch.relu(self.grouped(y))  # [B, 4, 4, 7]
    y = self.seq(y.flatten(2)).relu()  # [B, 5, 13]
    y = self.tokens(y.transpose(1, 2)).relu()  # [B, 13, 6]
    return self.head(self.bn3(self.vector(y.mean(1))).sigmoid())


def volume(self, x):
    y = self.a(x.unflatten(2, (2, 4)))
    return self.head(torch.relu(y).mean((2, 3, 4)))


@pytest.fixture(scope="module")
def flat():
    model = Wired(
        planes,
        a=nn.Conv2d(3, 4, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 1)),
        bn1=nn.BatchNorm2d(4),
        same=nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(1, 3), bias=False),
        bn2=nn.BatchNorm2d(6, affine=False),
        grouped=nn.Conv2d(6, 4, (1, 2), groups=2),
        seq=nn.Conv1d(4, 5, 4, stride=2),
        tokens=nn.Linear(5, 6),
        vector=nn.Linear(6, 5),
        bn3=nn.BatchNorm1d(5),
        head=nn.Linear(5, 4),
    )
    return model.double(), images()[0].double()


@pytest.fixture(scope="module")
def solid():
    model = Wired(volume, a=nn.Conv3d(3, 4, 2, stride=(1, 2, 1), padding=(1, 0, 0)), head=nn.Linear(4, 2))
    return model.double(), images()[0].double()


def upwards(self, x):
    y = torch.relu(self.bn(self.grouped(self.up(x).relu())))
    return self.head(self.depthwise(self.line(y.flatten(2)).relu()).mean(2))


@pytest.fixture(scope="module")
def transposed():
    model = Wired(
        upwards,
        up=nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0), dilation=(1, 2)),
        grouped=nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
        bn=nn.BatchNorm2d(6),
        line=nn.ConvTranspose1d(6, 4, 3, stride=3),
        depthwise=nn.ConvTranspose1d(4, 8, 2, groups=4),
        head=nn.Linear(8, 2),
    )
    return randomised(model).double(), images()[0].double()


@pytest.fixture(scope="module", params=["flat", "solid", "transposed"])
def case(request):
    """(trace, {module: layer}, values) with gradients recorded."""
    model, x = request.getfixturevalue(request.param)
    graph = trace(model, x)
    layers = {module_of(layer.weight): layer for g in find_groups(graph) for layer in find_layers(graph, g)}
    env = graph.live(model) | graph.feed(x)
    for node, name in graph.state.items():
        if name.endswith("weight"):
            env[node] = env[node].clone().requires_grad_()
    ends = [n for layer in layers.values() for n in (layer.x, layer.output)]
    graph.run(graph.nodes, env, len(x), keep=[*ends, *graph.outputs])
    return graph, layers, env


def test_every_layer_is_found_with_its_batch_norm(case):
    _, layers, _ = case
    with_norm = {name for name, layer in layers.items() if layer.output is not layer.call}
    assert (with_norm, len(layers)) in (({"a", "same", "vector"}, 7), (set(), 2), ({"grouped"}, 5))


def test_weight_gradients_equal_autograd(case):
    graph, layers, env = case
    outputs = env[graph.outputs[0]]
    loss = (outputs * normal(*outputs.shape, dtype=torch.float64)).sum()
    for name, layer in layers.items():
        delta, expected = torch.autograd.grad(loss, [env[layer.output], env[layer.weight_node]], retain_graph=True)
        x, delta = layer.padded(layer.channels_first(env[layer.x]).detach()), layer.channels_first(delta)
        expected = layer.kernel({layer.weight_node: expected})
        found = layer.weight_gradient(x, delta, env).detach()
        rows = [layer.row_gradient(x, delta[:, row], row, env) for row in range(delta.shape[1])]
        torch.testing.assert_close(torch.stack(rows).detach(), found)
        if layer.output is not layer.call:  # the gradient of the folded weight
            found = found * batchnorm.affine(layer.output, env).scale.detach()[:, None]
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected.flatten(1), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
def test_row_norms_are_those_of_the_folded_weight(case, p):
    _, layers, env = case
    for layer in layers.values():
        rows = layer.kernel(env).detach().flatten(1)
        if layer.output is not layer.call:
            rows = rows * batchnorm.affine(layer.output, env).scale[:, None]
        norms = layer.row_norms(env, p, torch.arange(len(layer.rows)))
        torch.testing.assert_close(norms, rows.detach().norm(p, dim=1))


def test_channels_first_are_the_rows(case):
    _, layers, env = case
    for layer in layers.values():
        z = env[layer.output].detach()
        first = layer.channels_first(z)
        assert first.shape[:2] == (len(z), len(layer.kernel(env)))
        assert torch.equal(first.reshape(*first.shape[:2], -1), z.movedim(layer.axis, 1).reshape(*first.shape[:2], -1))


def test_uneven_padding_is_completed(flat):
    model, x = flat
    graph = trace(model, x)
    (group,) = (g for g in find_groups(graph) if g.name == "same")
    (layer,) = find_layers(graph, group)
    padded = layer.padded(normal(1, 4, 4, 8))
    assert padded.shape == (1, 4, 4, 9) and not padded[..., -1].any()
    assert layer.geometry.padding == [1, 4]


def test_rows_say_which_row_is_which_neuron():
    model = Wired(lambda self, x: self.b(nn.functional.pixel_shuffle(self.a(x), 2)).mean((2, 3)), a=nn.Conv2d(3, 8, 1))
    model.b = nn.Conv2d(2, 2, 1)
    graph = trace(model, images()[0])
    (layer,) = find_layers(graph, find_groups(graph)[0])
    assert layer.rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_weight_used_twice_is_a_layer_at_both_places():
    model = Wired(lambda self, x: self.b(self.a(self.a(x).relu())), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    graph = trace(model, normal(3, 4))
    first, second = find_layers(graph, find_groups(graph)[0])
    assert first.weight == second.weight == "a.weight"
    assert [first.call, second.call] == graph.calls("a.weight")


SLIDING = {
    "1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2), (2, 4, 7, 6)),
    "3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 5)),
    "same": (nn.Conv2d(3, 4, (4, 3), padding="same"), (2, 3, 5, 6)),
    "linear": (nn.Linear(5, 4), (2, 5)),
    "sequence": (nn.Linear(5, 4), (2, 7, 5)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 4, stride=3, padding=2, output_padding=1, dilation=2), (2, 3, 5)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=(1, 0), groups=2), (2, 4, 3, 4)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 2, 3)),
    "transposed depthwise": (nn.ConvTranspose1d(3, 6, 2, stride=2, groups=3), (2, 3, 4)),
}


@pytest.mark.parametrize(("module", "shape"), SLIDING.values(), ids=SLIDING.keys())
def test_patches_times_weights_are_the_output(module, shape):
    model, x = nn.Sequential(module, nn.Identity()).double().eval(), normal(*shape, dtype=torch.float64)
    graph = trace(model, x)
    layer = layer_at(graph, graph.calls("0.weight")[0], "0.weight", torch.empty(0, 0, dtype=torch.int64))
    z = layer.channels_first(model(x))
    places = torch.randperm(z[:, 0].numel(), generator=torch.Generator().manual_seed(0))
    patches = layer.patches(layer.channels_first(x), z.shape[2:], places)
    groups = getattr(module, "groups", 1)
    weights = layer.kernel(graph.live(model)).flatten(1).chunk(groups)
    found = [p.flatten(1) @ w.T for p, w in zip(patches.chunk(groups, 1), weights, strict=True)]
    expected = z.movedim(1, -1).flatten(0, -2)[places]
    assert torch.allclose(torch.cat(found, 1) + module.bias, expected)
