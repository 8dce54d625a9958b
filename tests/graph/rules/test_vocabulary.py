import torch
from beside import Beside, inside, inside_all, without_place
from networks import images
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from wiring import Wired, free, groups_of, normal, once, owned, unsafe_groups

from singe.graph.analysis import analyse
from singe.graph.trace import trace

REFUSED = {
    "softmax": (lambda self, y: self.inner(y).softmax(1), nn.Identity(), "taken together by aten.softmax.int"),
    "layer norm": (
        lambda self, y: self.inner(y),
        nn.LayerNorm(6),
        "normalised across channels by aten.layer_norm.default in inner",
    ),
    "group norm": (
        lambda self, y: self.inner(y),
        nn.GroupNorm(1, 6),
        "normalised across channels by aten.group_norm.default in inner",
    ),
    "mean": (lambda self, y: y - y.mean(1, keepdim=True), nn.Identity(), "taken together by aten.mean.dim"),
    "largest": (lambda self, y: y - y.amax(1, keepdim=True), nn.Identity(), "taken together by aten.amax"),
    "outer product": (
        lambda self, y: (y[:, :, None] @ y[:, None, :]).sum(2),
        nn.Identity(),
        "multiplied with what cannot go by aten.matmul",
    ),
    "sorted": (lambda self, y: y.sort(1).values, nn.Identity(), "no rule for aten.sort"),
    "divisor": (lambda self, y: y / (1 + y.exp()), nn.Identity(), "aten.div.Tensor divides by it"),
    "picked by size": (
        lambda self, y: y.index_select(1, self.inner.weight[0].argsort()),
        nn.Embedding(1, 6),
        "no rule for aten.index_select",
    ),
    "computed norm": (
        lambda self, y: F.batch_norm(y, self.inner.running_mean, self.inner.running_var, self.inner.weight.exp()),
        nn.BatchNorm1d(6),
        "the weight of aten.batch_norm.default is computed",
    ),
    "computed weight": (
        lambda self, y: self.inner(y),
        parametrizations.spectral_norm(nn.Linear(6, 6)),
        "the weight of aten.linear.default in inner is computed",
    ),
    "masked weight": (
        lambda self, y: self.inner(y),
        prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5),
        "the weight of aten.linear.default in inner is computed, by a mask of torch.nn.utils.prune; make masks",
    ),
    "transposed weight": (
        lambda self, y: y @ self.inner.weight.T,
        nn.Linear(6, 6, bias=False),
        "aten.matmul.default multiplies with a parameter",
    ),
    "computed shift": (
        lambda self, y: y + self.inner.weight.exp(),
        nn.Embedding(1, 6),
        "added to a computed parameter by aten.add.Tensor",
    ),
    "averaged parameter": (
        lambda self, y: F.linear(y, self.inner.weight - self.inner.weight.mean(1, keepdim=True)),
        nn.Linear(6, 6, bias=False),
        "the weight of aten.linear.default is computed",
    ),
}


def around(wiring, inner):
    model = Wired(lambda self, x: self.head(wiring(self, self.a(x))), inner=inner, a=nn.Linear(4, 6))
    model.head = nn.Linear(6, 2)
    return model


def test_what_has_no_rule_freezes_what_it_reads_and_says_why():
    networks = {case: around(wiring, inner) for case, (wiring, inner, _) in REFUSED.items()}
    groups = groups_of(Beside(networks).eval(), normal(3, 4))
    assert free(groups) == {}
    for case, (_, _, reason) in REFUSED.items():
        assert without_place(case, groups[f"networks.{case}.a"].frozen).startswith(reason), case


FOLLOWED = {
    "slopes": (lambda self, y: self.inner(y), nn.PReLU(6), {"inner.weight@0": 1}),
    "scales": (lambda self, y: y * self.inner.weight, nn.Embedding(1, 6), {"inner.weight@1": 1}),
    "shifts": (lambda self, y: y - self.inner.weight[0], nn.Embedding(1, 6), {"inner.weight@1": 1}),
    "one for all": (lambda self, y: y * self.inner.weight, nn.Embedding(1, 1), {}),
    "twice": (
        lambda self, y: self.inner(self.inner(y).relu()),
        nn.Linear(6, 6),
        {"inner.weight@0": 1, "inner.weight@1": 1, "inner.bias@0": 1},
    ),
    "itself": (lambda self, y: (y @ y.T) @ y, nn.Identity(), {}),
    "length": (lambda self, y: F.normalize(y, dim=1), nn.Identity(), {}),
    "cosine": (lambda self, y: y * F.cosine_similarity(y, y.exp() - 1).unsqueeze(1), nn.Identity(), {}),
    "the larger one": (lambda self, y: torch.max(y, self.inner(y)), nn.Identity(), {}),
    "groups of statistics": (
        lambda self, y: self.inner(y),
        nn.GroupNorm(6, 6),
        {"inner.weight@0": 1, "inner.bias@0": 1},
    ),
    "shifts computed to zero": (
        lambda self, y: y * 3 - self.inner.weight[0] * (self.inner.weight[1] + 1).rsqrt(),
        nn.Embedding(2, 6),
        {"inner.weight@1": 1},
    ),
    "chosen": (lambda self, y: torch.where(y > 0.1, y, 0.0), nn.Identity(), {}),
    "products": (lambda self, y: y * (y * y).sum(1, keepdim=True), nn.Identity(), {}),
}


def test_what_neurons_meet_on_their_way_goes_with_them():
    model = Beside({case: around(wiring, inner) for case, (wiring, inner, _) in FOLLOWED.items()})
    x = normal(3, 4)
    groups = groups_of(model.eval(), x)
    assert free(groups) == inside_all({case: {"a": 6} for case in FOLLOWED})
    found = [groups[f"networks.{case}.a"] for case in FOLLOWED]
    for group, (case, (_, _, rides)) in zip(found, FOLLOWED.items(), strict=True):
        assert owned(group) == inside(case, once("a.weight", "a.bias", "head.weight@1") | rides)
    assert unsafe_groups(model, found, x) == {}


def test_places_where_a_condition_holds_are_no_channels():
    model = Wired(
        lambda self, x: self.b(self.a(x))[torch.where(x[0] > 0)[0].clamp(max=2)], a=nn.Linear(4, 6), b=nn.Linear(6, 3)
    )
    groups = groups_of(model.eval(), normal(4, 4))
    assert groups["a"].frozen is None


def test_channels_that_share_statistics_go_together():
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)]
    model, x = nn.Sequential(*layers).eval(), images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"0": 4}
    assert owned(groups["0"]) == {"0.weight@0": 2, "0.bias@0": 2, "1.weight@0": 2, "1.bias@0": 2, "4.weight@1": 72}
    assert unsafe_groups(model, [groups["0"]], x) == {}


def test_modules_whose_weights_are_not_followed_are_named_with_the_reason():
    model = Wired(lambda self, x: self.head(self.up(self.a(x).flatten(2).mT)[0].mean(1)), a=nn.Conv2d(3, 6, 1))
    model.up, model.head = nn.LSTM(6, 5, batch_first=True), parametrizations.spectral_norm(nn.Linear(5, 2))
    _, unfollowed = analyse(trace(model.eval(), images()[0]))
    assert unfollowed.keys() == {"up", "head"}
    assert "lstm" in unfollowed["up"] and "in head" in unfollowed["head"]
