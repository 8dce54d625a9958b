import pytest
import torch
from networks import MLP, DigitNet, FlattenNet, PlainNet, PreActNet, images, randomised
from torch import nn
from torch.utils import _pytree as pytree
from wiring import Wired, normal, run

from singe.graph.operators import aten
from singe.graph.trace import named_tensors, trace
from singe.removal.surgery import compact

aten_relu = aten.relu.default


@pytest.fixture(scope="module")
def plain():
    model = randomised(PlainNet())
    return model, trace(model, images(4)[0])


@pytest.mark.parametrize("make", [PlainNet, DigitNet, PreActNet])
def test_one_trace_equals_the_model_at_every_batch_size(make):
    model, channels = randomised(make()), 1 if make is DigitNet else 3
    graph = trace(model, images(4, channels=channels)[0])
    assert graph.dynamic
    for batch in (1, 2, 3, 9):
        x = images(batch, channels=channels, seed=batch)[0]
        torch.testing.assert_close(run(graph, model, x), model(x))


def test_one_image_is_enough_for_a_dynamic_trace():
    model = randomised(MLP())
    graph = trace(model, normal(1, 6, 10))
    assert graph.dynamic and graph.example_batch == 2
    x = normal(5, 6, 10)
    torch.testing.assert_close(run(graph, model, x), model(x))


def test_parameters_and_buffers_are_read_when_the_graph_runs():
    model, x = randomised(PreActNet()), images(3)[0]
    graph = trace(model, x)
    before = run(graph, model, x)
    randomised(model, seed=7)
    after = run(graph, model, x)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(before, after)


def test_tracing_leaves_the_model_as_it_was():
    model = randomised(PlainNet())
    model.train()
    model.classifier.eval()
    modes = [m.training for m in model.modules()]
    before = {n: (t, t.clone()) for n, t in named_tensors(model).items()}
    trace(model, images(2)[0])
    assert [m.training for m in model.modules()] == modes
    assert all(t is before[n][0] and torch.equal(t, before[n][1]) for n, t in named_tensors(model).items())


def in_place(self, x):
    z = self.a(x)
    y = torch.relu_(z)
    y += 1
    y *= y
    return self.b(y)


def test_operators_in_place_become_functional():
    model, x = Wired(in_place, a=nn.Linear(6, 5), b=nn.Linear(5, 3)), normal(4, 6)
    graph = trace(model, x)
    (call,) = graph.calls("a.weight")
    env = graph.live(model) | graph.feed(x)
    graph.run(graph.nodes, env, 4, keep=[call, *graph.outputs])
    torch.testing.assert_close(env[call], model.a(x))
    torch.testing.assert_close(env[graph.outputs[0]], model(x))
    assert not any(n.target._schema.is_mutable for n in graph.nodes)


@pytest.mark.parametrize(("rows", "columns"), [(4, 12), (2, 24)])
def test_a_batch_size_fixed_by_the_model_is_reported_and_kept(rows, columns):
    model = Wired(lambda self, x: self.b(self.a(x.view(rows, -1)).relu()), a=nn.Linear(columns, 6), b=nn.Linear(6, 3))
    x = normal(rows, columns)
    graph = trace(model, x)
    assert not graph.dynamic
    assert graph.example_batch == rows
    assert graph.shape(graph.outputs[0], rows) == (rows, 3)
    torch.testing.assert_close(run(graph, model, x), model(x))


def test_len_of_the_batch_fixes_it_to_that_of_the_example():
    model, x = randomised(FlattenNet()), images(4)[0]
    graph = trace(model, x)  # python's len() cannot be symbolic
    assert not graph.dynamic and graph.example_batch == 4
    torch.testing.assert_close(run(graph, model, x), model(x))


@pytest.mark.parametrize(
    "wiring",
    [
        lambda self, x: (self.a(x), [x.relu(), self.b(x)]),
        lambda self, x: {"second": self.b(x), "first": self.a(x)},
        lambda self, x: (self.a(x), None),
        lambda self, x: (self.a(x), 3, "a", x.shape[0]),
        lambda self, x: (x, self.a(x)),
        lambda self, x: self.norm(self.a(x)),
        lambda self, x: (self.norm(self.a(x)), self.b(x)),
    ],
    ids=["nested", "dict", "none", "no tensors", "input", "batch norm last", "batch norm among others"],
)
def test_outputs_come_back_as_the_model_returns_them(wiring):
    model, x = Wired(wiring, a=nn.Linear(6, 5), b=nn.Linear(6, 3), norm=nn.BatchNorm1d(5)), normal(4, 6)
    graph, x = trace(model, x), normal(7, 6, seed=4)
    ours, theirs = run(graph, model, x), model(x)
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True):
        assert torch.allclose(a, b, atol=1e-6) if isinstance(b, torch.Tensor) else a == b


def test_only_what_is_kept_outlives_its_last_use(plain):
    model, graph = plain
    x = images(3)[0]
    relus = [n for n in graph.nodes if n.target is aten_relu]
    given = graph.live(model) | graph.feed(x)
    env = dict(given)
    graph.run(graph.nodes, env, 3, keep=[relus[1], *graph.outputs])
    assert set(env) - set(given) == {relus[1], *graph.outputs}
    assert set(given) <= set(env)


def test_sizes_follow_the_batch(plain):
    _, graph = plain
    (call,) = graph.calls("features.4.weight")
    assert graph.shape(call, 5) == (5, 9, 4, 4)
    assert graph.batch_axes(call) == [0]
    assert graph.nbytes([call, *graph.inputs], 5) == 4 * 5 * (9 * 4 * 4 + 3 * 8 * 8)


def test_sizes_multiplied_with_the_batch_follow_it():
    model = Wired(lambda self, x: self.a(x.flatten(0, 1)).view(x.shape[0], -1), a=nn.Linear(5, 2))
    graph = trace(model, normal(2, 3, 5))
    (call,) = graph.calls("a.weight")
    assert graph.shape(call, 7) == (21, 2)
    x = normal(7, 3, 5)
    torch.testing.assert_close(run(graph, model, x), model(x))


def test_calls_are_found_in_execution_order_and_parameters_by_position(plain):
    _, graph = plain
    (conv,) = graph.calls("features.4.weight")
    assert graph.parameter(conv, 1, "weight") == "features.4.weight"
    assert graph.parameter(conv, 2, "bias") is None
    twice = Wired(lambda self, x: self.a(self.a(x).relu()), a=nn.Linear(4, 4))
    first, second = trace(twice, normal(2, 4)).calls("a.weight")
    assert second in first.users.copy().popitem()[0].users


def test_a_tied_weight_is_used_under_one_name():
    model = Wired(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    graph = trace(model, normal(2, 4))
    used = {n.args[1] for n in graph.nodes if n.target is aten.linear.default}
    assert len(used) == 1
    assert len(graph.calls(graph.state[used.pop()])) == 2


def test_named_tensors_lists_tied_tensors_under_every_name():
    model = DigitNet(2)
    model.again = model.stem
    tensors = named_tensors(model)
    assert tensors["again.weight"] is tensors["stem.weight"]
    assert tensors["bn.running_var"] is model.bn.running_var


def test_a_trace_holds_until_a_cut_breaks_a_width_it_holds():
    def wiring(self, x):
        y = self.b(self.a(x).relu()).relu()
        return self.c(y.view(y.shape[0], y.shape[1], 1).flatten(1))

    model, x = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(6, 5), c=nn.Linear(5, 2)), normal(3, 4)
    graph, index = trace(model, x), torch.tensor([1])
    assert graph.holds_for(model, x)
    compact(model, {("a.weight", 0): index, ("a.bias", 0): index, ("b.weight", 1): index})
    assert graph.holds_for(model, x), "no size of a is written in the graph"
    compact(model, {("b.weight", 0): index, ("b.bias", 0): index, ("c.weight", 1): index})
    assert not graph.holds_for(model, x)


def test_a_trace_of_a_flattened_network_holds_after_channels_are_cut():
    model = Wired(lambda self, x: self.head(self.a(x).relu().flatten(1)), a=nn.Conv2d(3, 6, 3))
    model.head = nn.Linear(6 * 36, 4)
    x, graph = images()[0], trace(model.eval(), images()[0])
    assert graph.holds_for(model, x)
    compact(model, {("a.weight", 0): torch.tensor([1, 4]), ("a.bias", 0): torch.tensor([1, 4]),
                    ("head.weight", 1): torch.cat([torch.arange(36) + 36, torch.arange(36) + 4 * 36])})  # fmt: skip
    assert graph.holds_for(model, x)


def test_a_trace_that_holds_a_width_is_broken_by_a_cut_and_says_so():
    def halves(self, x):
        y = self.a(x)
        return self.head(y.view(y.shape[0], 2, y.shape[1] // 2, 36).sum((2, 3)))

    model = Wired(halves, a=nn.Conv2d(3, 6, 3), head=nn.Linear(2, 4)).eval()
    x, graph = images()[0], trace(model, images()[0])
    assert graph.holds_for(model, x)
    compact(model, {("a.weight", 0): torch.tensor([1, 4]), ("a.bias", 0): torch.tensor([1, 4])})
    assert model(x).shape == (5, 4) and not graph.holds_for(model, x)
    assert trace(model, x).holds_for(model, x)


def test_dicts_are_fed_by_their_keys_in_any_order():
    class Difference(nn.Module):
        def forward(self, left, right):
            return left - 2 * right

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    graph = trace(Difference(), {"left": x, "right": y}, lambda model, batch: model(**batch))
    env = graph.feed({"right": y, "left": x})
    graph.run(graph.nodes, env, 4, keep=graph.outputs)
    assert torch.equal(env[graph.outputs[0]], x - 2 * y)
