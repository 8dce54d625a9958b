import pytest
import torch
from networks import MLP, DigitNet, images, randomised
from states import random_states, same, snapshot
from torch import nn
from torch.nn import functional as F
from wiring import Wired, frozen, groups_of, normal, unsafe_groups

from singe.graph.trace import plain_call
from singe.models.copies import copy_of
from singe.removal.stand_in import stand_in


def shifted(h):
    """Moves the first four channels along, whichever these are."""
    return torch.cat([h[:, :4].roll(1, 2), h[:, 4:]], 1)


def branch(self, x):
    h = shifted(self.a(x).relu())
    return self.head(x.mean((2, 3))) + self.scale * self.b(h)[:, :, 0].mean(2)


def branched():
    modules = {"a": nn.Conv2d(3, 12, 3), "b": nn.Conv2d(12, 5, 1), "head": nn.Linear(3, 5)}
    return Wired(branch, **modules, scale=nn.Parameter(torch.ones(5))).eval()


class Masked(nn.Module):
    """Of its logits one is never taken."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).masked_fill(torch.arange(5) == 4, float("-inf"))


class Chaotic(nn.Module):
    """Rounding grows from block to block, but for gates of zero."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(10, 12), nn.Linear(12, 4)
        self.blocks, self.gates = nn.ModuleList(nn.Linear(12, 12) for _ in range(30)), nn.Parameter(torch.zeros(30))

    def forward(self, x):
        x = self.first(x)
        for block, gate in zip(self.blocks, self.gates, strict=True):
            x = x + gate * (50 * block(x)).sin()
        return self.head(x)


def hidden_by(what):
    model = branched()
    with torch.no_grad():
        if what == "nothing":
            return model
        if what == "weights of zero":
            model.b.weight.zero_()
        elif what == "a scale of zero":
            model.scale.zero_()
        elif what == "a scale of a millionth":
            model.scale.fill_(1e-6)
        elif what == "larger outputs":
            model.head.weight.mul_(1e6)
        elif what == "half precision":
            model.scale.fill_(0.02)
            return model.bfloat16()
    return model


@pytest.mark.parametrize(
    "what",
    ["nothing", "weights of zero", "a scale of zero", "a scale of a millionth", "larger outputs", "half precision"],
)
def test_what_goes_wrong_is_seen_whatever_hides_it(what):
    model = hidden_by(what)
    x = images(2)[0].to(model.scale.dtype)
    groups = groups_of(model, x)
    assert "a" not in frozen(groups), "the graph does not know"
    assert "trial removal failed" in unsafe_groups(model, [groups["a"]], x)["a"]


def test_what_goes_wrong_is_seen_beside_infinite_outputs():
    model, x = Masked(hidden_by("a scale of zero")).eval(), images(2)[0]
    groups = groups_of(model, x)
    assert unsafe_groups(model, [groups["inner.a"]], x).keys() == {"inner.a"}


def test_a_network_that_random_weights_would_make_chaotic_keeps_its_own():
    torch.manual_seed(0)
    model = Chaotic().eval()
    network, x = stand_in(model, normal(2, 10), plain_call)
    assert x.dtype == torch.float64 and not network.gates.any()


def test_a_scale_that_attention_takes_from_its_width_is_seen():
    def wiring(self, x):
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))

    torch.manual_seed(0)
    layers = {name: nn.Linear(6, 8) for name in "qkv"}
    model = Wired(wiring, **layers, o=nn.Linear(8, 6)).eval()
    with torch.no_grad():
        for name in "qk":
            model.get_submodule(name).weight.mul_(1e-2)  # hardly anything but an average
    groups = groups_of(model, x := normal(2, 5, 6))
    assert unsafe_groups(model, [groups["q"], groups["v"]], x).keys() == {"q"}


class Casting(MLP):
    """Computes in float32 whatever it is given."""

    def forward(self, x):
        return super().forward(x).float().softmax(1).to(x.dtype)


class Fixed(MLP):
    def forward(self, x):
        return super().forward(x) + torch.ones(4, dtype=torch.float32) @ torch.ones(4, 4, dtype=x.dtype)


@pytest.mark.parametrize(
    ("make", "given", "taken"),
    [
        (MLP, torch.float32, torch.float64),
        (MLP, torch.float16, torch.float64),
        (Casting, torch.float32, torch.float32),
        (Casting, torch.bfloat16, torch.float32),
        (Fixed, torch.float32, torch.float32),
    ],
)
def test_it_computes_as_precisely_as_the_code_does(make, given, taken):
    network, x = stand_in(randomised(make()).to(given).eval(), normal(2, 10, dtype=given), plain_call)
    assert {p.dtype for p in network.parameters()} == {x.dtype} == {taken}


def test_inputs_that_are_no_real_numbers_stay():
    def wiring(self, batch):
        return self.a(batch["x"] * batch["mask"]) + self.e(batch["y"])

    model = Wired(wiring, a=nn.Linear(10, 4), e=nn.Embedding(4, 4))
    batch = {"x": normal(2, 10), "mask": torch.tensor([[True], [False]]), "y": torch.arange(2)}
    _, given = stand_in(model.eval(), batch, lambda m, b: m(b))
    assert {name: t.dtype for name, t in given.items()} == {
        "x": torch.float64, "mask": torch.bool, "y": torch.int64,
    }  # fmt: skip


def test_weights_that_hide_nothing_stay_and_so_do_the_network_and_random_states():
    model, x = randomised(DigitNet(4)).eval(), images(2, channels=1)[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.where(parameter.abs() < 0.02, 0.02, parameter))
            if name.endswith("2.weight"):
                parameter.zero_()
    before = snapshot(model), random_states()
    network, _ = stand_in(model, x, plain_call)
    assert same((snapshot(model), random_states()), before)
    for name, own in network.named_parameters():
        given = model.get_parameter(name)
        assert torch.equal(own, given.double()) if given.any() else own.abs().max() > 1e-2


def test_a_network_that_nothing_stands_in_for_is_taken_as_it_is():
    def wiring(self, x):
        if self.a.weight.dtype != torch.float32 or self.a.weight[0, 0] != 0:
            raise RuntimeError("not like that")
        return self.a(x)

    model = Wired(wiring, a=nn.Linear(10, 4)).eval()
    with torch.no_grad():
        model.a.weight[0, 0] = 0
    network, x = stand_in(model, given := normal(2, 10), plain_call)
    assert x.dtype == given.dtype and torch.equal(network.a.weight, model.a.weight)


def test_it_is_a_copy():
    model = randomised(MLP()).eval()
    network, _ = stand_in(model, normal(2, 10), plain_call)
    assert network is not model and type(network) is type(copy_of(model))
