import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ExciteNet, PlainNet, ResNeXt, images, randomised
from torch import nn

from singe.graph.nodes import ancestors
from singe.graph.trace import named_tensors, trace
from singe.refit.activations import Activations


@functools.cache
def exported(make):
    model = randomised(make()).eval()
    return model, trace(model, images(2)[0])


def prepared(make, step=3, room=1 << 30):
    original, graph = exported(make)
    model, x = copy.deepcopy(original), images(8)[0]
    nodes = [n for n in graph.nodes if not graph.is_size(n) and isinstance(n.meta["val"], torch.Tensor)]
    return model, x, graph, nodes, Activations(graph, x, step, room)


def afresh(model, x, graph, ends, step=3):
    """The same without anything that stays."""
    needed = ancestors(ends)
    for part in x.contiguous(memory_format=torch.channels_last).split(step):
        env = graph.live(model) | graph.feed(part)
        graph.run([n for n in graph.nodes if n in needed], env, len(part), keep=ends)
        yield [env[n] for n in ends]


def look(values, model, ends, **options):
    with torch.no_grad():
        return list(values(model, ends, **options))


def same(ours, theirs):
    return all(torch.equal(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("make", [PlainNet, ResNeXt, ExciteNet])
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_looks_are_as_if_nothing_had_stayed(make, data):
    model, x, graph, nodes, values = prepared(make, room=data.draw(st.sampled_from([0, 40_000, 1 << 30])))
    names = sorted(n for n, t in named_tensors(model).items() if t.is_floating_point())
    for _ in range(data.draw(st.integers(2, 5))):
        change = data.draw(st.sampled_from(["none", "write", "replace"]))
        name = data.draw(st.sampled_from(names))
        holder, own = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        with torch.no_grad():
            if change == "write":
                getattr(holder, own).mul_(0.5)
            elif change == "replace" and isinstance(getattr(holder, own), nn.Parameter):
                setattr(holder, own, nn.Parameter(getattr(holder, own) * 0.5))
        ends = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3, unique=True))
        again = data.draw(st.lists(st.sampled_from(nodes), max_size=2))
        with torch.no_grad():
            expected = list(afresh(model, x, graph, ends))
        assert same(look(values, model, ends, again=again), expected)


def runs(graph, monkeypatch):
    """Which nodes are run from now on."""
    seen, run = [], graph.run

    def watched(nodes, *arguments, **options):
        seen.extend(nodes)
        return run(nodes, *arguments, **options)

    monkeypatch.setattr(graph, "run", watched)
    return seen


def test_a_look_further_behind_runs_the_rest_alone(monkeypatch):
    model, _, graph, nodes, values = prepared(PlainNet, step=8)
    seen = runs(graph, monkeypatch)
    for node in nodes:
        look(values, model, [node])
    assert len(seen) == len(set(seen)) and set(seen) == ancestors(nodes) & set(nodes)


def test_without_room_all_is_run_again(monkeypatch):
    model, _, graph, nodes, values = prepared(PlainNet, step=8, room=0)
    look(values, model, nodes[-1:])
    seen = runs(graph, monkeypatch)
    look(values, model, nodes[-1:])
    assert set(seen) == ancestors(nodes[-1:]) & set(nodes)


def test_what_lies_before_a_change_is_not_run_again(monkeypatch):
    model, _, graph, nodes, values = prepared(PlainNet, step=8)
    changed = graph.calls("features.4.weight")[0]
    look(values, model, [nodes[-1]], again=[changed.args[0]])
    with torch.no_grad():
        model.features[4].weight.mul_(0)
    seen = runs(graph, monkeypatch)
    look(values, model, [nodes[-1]])
    assert seen[0] is changed


def test_a_look_that_is_broken_off_leaves_nothing_half_done():
    model, x, graph, nodes, values = prepared(PlainNet)
    look(values, model, [nodes[2]])
    with torch.no_grad():
        next(iter(values(model, [nodes[5]])))
        assert same(look(values, model, [nodes[-1]]), afresh(model, x, graph, [nodes[-1]]))
