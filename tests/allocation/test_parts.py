import pytest
import torch
from networks import DigitNet, images, randomised
from torch import nn
from torch.nn import functional as F
from wiring import Wired

import singe
from singe.allocation.parts import named_parts
from singe.graph.analysis import find_groups
from singe.graph.trace import trace


@pytest.fixture(scope="module")
def digit_groups():
    model = randomised(DigitNet(3))
    return model, find_groups(trace(model, images(4, channels=1)[0]))


STREAM_1 = {"stem"}
BLOCK_1 = {"blocks.1.conv1", "blocks.1.conv2"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ((), set()),
        (["blocks.1.conv1"], {"blocks.1.conv1"}),
        (["blocks.0.conv2"], STREAM_1),  # writes into the stem's stream
        (["blocks.1.bn1"], {"blocks.1.conv1"}),
        (["blocks.1"], BLOCK_1),
        (["*.conv1"], {"blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1"}),
        (["blocks.[12].conv1", "stem"], {"blocks.1.conv1", "blocks.2.conv1", "stem"}),
        (["blocks.[1]"], BLOCK_1),  # a pattern that names a parent
        (["*"], {"stem", "blocks.0.conv1", *BLOCK_1, "blocks.2.conv1", "blocks.2.conv2", "head"}),
    ],
)
def test_patterns_are_names_parents_and_patterns(digit_groups, patterns, expected):
    model, groups = digit_groups
    named = [named_parts(model, groups, pattern, "ignore") for pattern in patterns]
    assert set().union(*named) == expected


@pytest.mark.parametrize("pattern", ["conv1", "block", "blocks.9", "blocks.1.conv", "*.norm"])
def test_a_pattern_that_names_nothing_is_refused(digit_groups, pattern):
    with pytest.raises(ValueError, match="ignore") as caught:
        named_parts(*digit_groups, pattern, "ignore")
    assert repr(pattern) in str(caught.value)


def test_a_group_goes_by_its_own_name_too():
    model = Wired(lambda self, x: F.linear(F.conv2d(x, self.w).relu().mean((2, 3)), self.v), bn=nn.BatchNorm2d(1))
    model.w, model.v = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(2, 6))
    groups = find_groups(trace(model, images()[0]))
    assert [g.name for g in groups] == ["w", "v"]  # no module holds them but the network
    assert named_parts(model, groups, "w", "ignore") == {"w"}
    assert named_parts(model, groups, "*", "ignore") == {"w", "v"}


def test_brackets_in_a_name_and_second_names_are_names():
    body = nn.Linear(4, 5)
    model = Wired(lambda m, x: m.heads["[a]"](m.again(x).relu()), body=body, again=body,
                  heads=nn.ModuleDict({"[a]": nn.Linear(5, 3)}))  # fmt: skip
    parts = find_groups(trace(model, torch.rand(4, 4)))
    assert named_parts(model, parts, "heads.[a]", "ignore") == {"heads.[a]"}
    batch = torch.rand(6, 4), torch.arange(6) % 3
    assert torch.equal(singe.score(model, batch, "again"), singe.score(model, batch, "body"))
    assert torch.allclose(singe.reference.score(model, batch, "again"), singe.score(model, batch, "body"), rtol=1e-4)
    assert named_parts(model, parts, "again", "ignore") == named_parts(model, parts, "body", "ignore") == {"body"}
