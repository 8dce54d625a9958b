import math
from typing import NamedTuple

import pytest
import torch
from networks import randomised
from torch import nn
from torch.nn import functional as F
from wiring import normal

from singe.allocation.goal import left_alone
from singe.graph.trace import trace
from singe.removal.plan import Plan
from singe.survey import survey
from singe.task import Task


def surveyed(model, x, seconds=60.0):
    model = randomised(model).eval()
    return survey(model, trace(model, x), x, Task(), lambda groups: left_alone(model, groups, ()), seconds)


class Split(nn.Module):
    """Of its two attributes one counts the channels of a part, the other the parts."""

    def __init__(self, width: int, parts: int, by_width: bool) -> None:
        super().__init__()
        self.width, self.parts, self.by_width = width, parts, by_width
        self.a, self.b = nn.Conv2d(3, width * parts, 1), nn.Conv2d(width, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        y = self.a(x).relu()
        parts = torch.split(y, self.width, 1) if self.by_width else torch.chunk(y, self.parts, 1)
        return self.head(self.b(sum(parts)).relu().mean((2, 3)))


@pytest.mark.parametrize("by_width", [True, False])
@pytest.mark.parametrize(("width", "parts"), [(6, 2), (4, 4)])
def test_an_attribute_follows_only_where_that_is_right(width, parts, by_width):
    found = surveyed(Split(width, parts, by_width), torch.randn(2, 3, 4, 4))
    assert {g.name: g.size for g in found.able} == {"a": width, "b": 5}
    widths = {s.tensor for g in found.able for s in g.slices if s.role == "width"}
    assert widths == ({"width"} if by_width or width != parts else set())


class Shape(nn.Module):
    """Attention whose heads are as wide as its input says."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.norm = 2, nn.LayerNorm(8)
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(x)))


def test_modules_that_stand_alike_are_judged_together():
    model = nn.Sequential(nn.Linear(5, 8), *(Shape() for _ in range(5)), nn.Flatten(), nn.Linear(56, 3))
    found = surveyed(model, torch.randn(2, 7, 5))
    assert [g.name for g in found.able] == [f"{i}.up" for i in range(1, 6)]
    reasons = [found.whole[f"{i}.qkv"] for i in range(1, 6)]
    fixed = "a view or reshape has a fixed number of channels: shape "
    assert reasons[0].startswith(f"trial removal failed: {fixed}")
    assert all(r.startswith(f"trial removal of 1.qkv (of the same kind) failed: {fixed}") for r in reasons[1:])


class Auxiliary(nn.Module):
    """A head that lives in train mode only reads some channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aux, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 6, 1), nn.Linear(8, 3)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        y = self.a(x).relu()
        out = self.head(y.mean((2, 3)))
        return (out, self.last(self.aux(y[:, :4]))) if self.training else out


def test_what_lives_in_train_mode_only_is_followed_and_stays():
    model, x = Auxiliary(), torch.randn(2, 3, 4, 4)
    found = surveyed(model, x)
    groups = {g.name: g for g in found.groups}
    assert not model.training
    assert found.whole["aux"] == "used in train mode only, where nothing scores it"
    assert "aux.weight" in {s.tensor for s in groups["a"].slices if s.role == "reads"}
    assert groups["a"].size == groups["a#2"].size == 4


class Elsewhere(nn.Module):
    """One layer is for larger inputs, one for another method, one for training; a weight is never used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.head, self.embedding, self.auxiliary = nn.Linear(6, 2), nn.Linear(6, 3), nn.Linear(6, 2)
        self.never = nn.Parameter(torch.ones(3))
        self.tied = nn.Linear(6, 2)
        self.tied.weight, self.tied.bias = self.head.weight, self.head.bias

    def features(self, x):
        x = self.a(x).relu()
        return (self.b(x) if x.shape[-1] < 8 else self.large(x)).relu().mean((2, 3))

    def embed(self, x):
        return self.embedding(self.features(x))

    def forward(self, x):
        features = self.features(x)
        return (self.head(features), self.auxiliary(features)) if self.training else self.head(features)


def test_layers_that_the_example_does_not_reach_are_named():
    found = surveyed(Elsewhere(), torch.randn(2, 3, 4, 4))
    reasons = {
        name: reason
        for name, reason in found.frozen.items()
        if "not called on this example, or its result unused" in reason
    }
    assert reasons.keys() == {"large", "embedding"}


def test_so_they_are_where_train_mode_cannot_be_looked_at():
    class Untraceable(Elsewhere):
        def forward(self, x):
            if self.training and x.sum() > 0:
                return self.auxiliary(self.features(x))
            return self.head(self.features(x))

    found = surveyed(Untraceable(), torch.randn(2, 3, 4, 4))
    assert {"large", "embedding"} <= found.frozen.keys()


def test_a_survey_ends_in_time():
    with pytest.raises(TimeoutError, match="expected to find out within 1e-09 s what can be removed from Split"):
        surveyed(Split(6, 2, True), torch.randn(2, 3, 4, 4), 1e-9)


def test_owners_that_take_too_much_memory_are_refused(monkeypatch):
    monkeypatch.setattr("singe.graph.analysis._MEMORY", 64)
    with pytest.raises(ValueError, match="expected inputs small enough to say who owns each element"):
        surveyed(Split(6, 2, True), torch.randn(2, 3, 4, 4))


class Shaped(nn.Module):
    """Brings a vector into a shape that it keeps."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.view(len(x), *self.shape)


class Size(NamedTuple):
    channels: int
    height: int
    width: int


@pytest.mark.parametrize("shape", [(6, 2, 2), [6, 2, 2], Size(6, 2, 2), torch.Size([6, 6, 6])], ids=repr)
@pytest.mark.parametrize("kind", [Shaped, lambda shape: nn.Unflatten(1, shape)], ids=["own", "torch's"])
def test_a_shape_that_a_module_keeps_follows(kind, shape):
    layers = [nn.Linear(4, math.prod(shape)), kind(shape), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.LazyLinear(2)]
    model, x = nn.Sequential(*layers), normal(3, 4)
    model(x)
    found = surveyed(model.eval(), x)
    assert {g.name: g.size for g in found.able} == {"0": 6, "2": 5}
    pruned = Plan.of([(found.able[0], [1, 4])]).apply(model)
    kept = getattr(pruned[1], "shape" if kind is Shaped else "unflattened_size")
    assert list(kept) == [4, *shape[1:]] and type(kept) is type(shape)
    pruned(x)
