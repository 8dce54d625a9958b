import torch
from torch import nn
from wiring import Wired, normal

from singe.graph.stored import Stored
from singe.graph.trace import trace


def stored_and_last(wiring):
    """What a network stores, and the argument of its last operator that does not come from the input."""
    graph = trace(Wired(wiring, a=nn.Linear(4, 6)), normal(3, 4))
    return Stored(graph), graph.nodes[-1].args[1], graph


def test_values_of_constants_are_known_and_those_of_parameters_or_chance_are_not():
    stored, node, _ = stored_and_last(lambda self, x: x * torch.arange(4).flip(0))
    assert stored.value(node).tolist() == [3, 2, 1, 0]
    for wiring in (lambda self, x: x * self.a.bias[:4], lambda self, x: x * torch.rand(4).argsort()):
        stored, node, _ = stored_and_last(wiring)
        assert stored.value(node) is None


def test_what_the_code_makes_is_stored_unless_it_is_drawn():
    for made, held in (
        (lambda: torch.arange(4).float(), True),
        (lambda: torch.ones(4), True),
        (lambda: torch.rand(4), False),
    ):
        stored, node, _ = stored_and_last(lambda self, x, made=made: x * (self.a.bias[:4] * made()))
        assert stored.holds(node) == held
        stored, node, _ = stored_and_last(lambda self, x, made=made: x * made())
        assert stored.holds(node) == held and not stored.is_computed(node)


def test_parameters_are_found_behind_however_many_ways():
    def doubled(self, x):
        value = self.a.bias[:4]
        for _ in range(60):
            value = value + value
        return x * value

    stored, node, graph = stored_and_last(doubled)
    assert [graph.state[source] for source in stored.sources(node)] == ["a.bias"]
    assert stored.is_computed(node)


def test_the_elements_of_one_parameter_are_moved_and_not_computed():
    stored, node, _ = stored_and_last(lambda self, x: x * self.a.weight.t().flip(0)[:, 2])
    assert stored.is_moved(node) and not stored.is_computed(node)
