import pytest
import torch
from networks import images
from torch import nn
from torch.nn import functional as F
from wiring import Attention, BiasedAttention, Wired, free, frozen, groups_of, normal, once, owned, unsafe_groups

import singe


def gate(self, x):
    y = self.a(x)
    s = torch.sigmoid(self.up(self.down(y.mean((2, 3), keepdim=True)).relu()))
    return self.head((y * s).relu().mean((2, 3)))


def test_a_channel_gate_is_coupled_with_what_it_gates():
    model = Wired(gate, a=nn.Conv2d(3, 6, 3), down=nn.Conv2d(6, 4, 1), up=nn.Conv2d(4, 6, 1), head=nn.Linear(6, 2))
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 6, "down": 4}
    assert groups["a"].writers == ("a.weight", "up.weight")
    assert owned(groups["a"]) == once("a.weight", "a.bias", "up.weight", "up.bias", "down.weight@1", "head.weight@1")


def spatial_gate(self, x):
    y = self.a(x).relu()
    return self.head((y * torch.sigmoid(self.g(self.b(y).relu()))).mean((2, 3)))


def test_a_spatial_gate_is_frozen_and_what_it_gates_is_not():
    model = Wired(spatial_gate, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(6, 4, 1), g=nn.Conv2d(4, 1, 1), head=nn.Linear(6, 2))
    groups = groups_of(model, images()[0])
    assert free(groups) == {"a": 6, "b": 4}
    assert frozen(groups)["g"] == "broadcast over other neurons by aten.mul.Tensor"


def test_an_explicit_expand_is_a_broadcast_too():
    def wiring(self, x):
        y = self.a(x)
        return self.head((y + self.g(x).expand(-1, y.shape[1], -1, -1)).relu().mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), g=nn.Conv2d(3, 1, 1), head=nn.Linear(6, 2))
    groups = groups_of(model, images()[0])
    assert frozen(groups)["g"].startswith("broadcast over other neurons by aten.add")


def pooled(pool, size):
    return lambda y: pool(y, size).flatten(1)


POOLS = {
    "1d": (pooled(F.adaptive_max_pool1d, 2), 1, 2),
    "2d": (pooled(F.adaptive_max_pool2d, (1, 3)), 2, 3),
    "2d with places": (lambda y: F.adaptive_max_pool2d(y, 2, return_indices=True)[0].flatten(1), 2, 4),
    "3d": (pooled(F.adaptive_max_pool3d, 2), 3, 8),
    "means": (pooled(F.adaptive_avg_pool3d, (2, 1, 2)), 3, 4),
}


@pytest.mark.parametrize(("pool", "rank", "columns"), POOLS.values(), ids=POOLS.keys())
def test_adaptive_pooling_keeps_channels_apart(pool, rank, columns):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    model = Wired(lambda self, x: self.head(pool(self.a(x).relu())), a=kind(3, 4, 1), head=nn.Linear(4 * columns, 2))
    x = normal(2, 3, *[5] * rank)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 4}
    assert owned(groups["a"]) == {"a.weight@0": 1, "a.bias@0": 1, "head.weight@1": columns}
    assert unsafe_groups(model, [groups["a"]], x) == {}


@pytest.mark.parametrize("divide", [lambda y: y / 3, lambda y: y.mul(2).div(0.5).sub(1).pow(2).clamp(0, 5)])
def test_scalars_own_nothing(divide):
    model = Wired(lambda self, x: self.b(divide(self.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    assert free(groups_of(model, normal(3, 4))) == {"a": 6}


def test_channels_that_are_only_summed_go_one_by_one():
    model = Wired(lambda self, x: self.b(self.a(x).relu().sum(1, keepdim=True)), a=nn.Linear(4, 6), b=nn.Linear(1, 2))
    x = normal(3, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_branches_that_are_summed_lose_the_same_channels():
    def wiring(self, x):
        y = self.a(x).relu().view(len(x), 2, 3, 8, 8)
        return self.head((y * y.mean((3, 4), keepdim=True).softmax(1)).sum(1).mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), head=nn.Linear(3, 2))
    assert free(groups_of(model, images()[0])) == {"a": 3}


def outer(self, x):
    return self.head((self.a(x)[:, :, None] * self.b(x)[:, None, :]).flatten(1))


@pytest.mark.parametrize(("a", "b"), [(4, 5), (5, 4), (4, 4)])
def test_of_an_outer_product_at_most_one_side_can_be_pruned(a, b):
    model = Wired(outer, a=nn.Linear(3, a), b=nn.Linear(3, b), head=nn.Linear(a * b, 2))
    x = normal(3, 3)
    groups = groups_of(model, x)
    assert len(free(groups)) <= 1
    assert unsafe_groups(model, [groups[name] for name in free(groups)], x) == {}


UPSAMPLINGS = {
    "nearest": lambda y: F.interpolate(y, scale_factor=2),
    "exact": lambda y: F.interpolate(y, size=(13, 11), mode="nearest-exact"),
    "bilinear": lambda y: F.interpolate(y, scale_factor=1.5, mode="bilinear", align_corners=False),
    "bicubic": lambda y: F.interpolate(y, size=12, mode="bicubic", antialias=False),
    "at places": lambda y: F.grid_sample(
        y, torch.linspace(-1, 1, 10).view(1, 5, 1, 2).expand(len(y), 5, 6, 2), align_corners=False
    ),
}


@pytest.mark.parametrize("upsample", UPSAMPLINGS.values(), ids=UPSAMPLINGS.keys())
def test_upsampling_keeps_channels_apart(upsample):
    model = Wired(lambda self, x: self.head(self.b(upsample(self.a(x).relu())).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
    model.b, model.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6, "b": 5}
    assert unsafe_groups(model, [groups["a"], groups["b"]], x) == {}


def test_channels_that_tell_where_to_look_stay():
    def wiring(self, x):
        places = torch.tanh(self.flow(x)).permute(0, 2, 3, 1)
        return self.head(F.grid_sample(self.a(x).relu(), places, align_corners=False).mean((2, 3)))

    model = Wired(wiring, flow=nn.Conv2d(3, 2, 1), a=nn.Conv2d(3, 6, 1), head=nn.Linear(6, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert frozen(groups)["flow"] == "tells aten.grid_sampler.default where to look"
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_one_slope_for_all_channels_binds_none():
    model = Wired(
        lambda self, x: self.head(self.act(self.a(x))), a=nn.Linear(4, 6), act=nn.PReLU(), head=nn.Linear(6, 2)
    )
    assert free(groups_of(model, normal(3, 4))) == {"a": 6}


@pytest.mark.parametrize("fused", [True, False])
def test_whole_heads_go_and_the_attributes_that_count_them_follow(fused):
    model, x = Attention(True, fused).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3
    widths = {s.tensor: s.multiplicity for s in group.slices if s.role == "width"}
    assert widths == {"num_heads": 1, "attn_dim": 4}
    assert unsafe_groups(model, [group], x) == {}


class Masked(nn.Module):
    """Attention that may not see everything, or with a bias."""

    def __init__(self, mask):
        super().__init__()
        self.mask, self.num_heads = mask, 3
        self.q, self.k, self.v, self.proj = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 5)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (self.num_heads, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2))


class Placed(Masked):
    """Attention with relative positions, of which every head holds its queries against the same ones."""

    def __init__(self):
        super().__init__(None)
        self.positions = nn.Parameter(normal(13, 4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(2, (self.num_heads, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        apart = torch.arange(7)[:, None] - torch.arange(7) + 6
        scores = q @ k.mT + torch.einsum("bhnd,nmd->bhnm", q, self.positions[apart])
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_whole_heads_go_where_all_are_multiplied_with_the_same_parameter():
    model, x = Placed().eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3
    layers = {f"{layer}.{kind}@0": 4 for layer in "qkv" for kind in ("weight", "bias")}
    assert owned(group) == layers | {"proj.weight@1": 4, "num_heads@0": 1}
    assert unsafe_groups(model, [group], x) == {}


class Viewed(nn.Module):
    """Attention whose code says how wide a head is, so that there may be any number of them."""

    def __init__(self, count, width, heads, wide):
        super().__init__()
        setattr(self, count, heads)
        setattr(self, width, wide)
        self.width = width
        self.q, self.k, self.v, self.proj = *(nn.Linear(5, heads * wide) for _ in range(3)), nn.Linear(heads * wide, 5)

    def forward(self, x):
        heads = (*x.shape[:-1], -1, getattr(self, self.width))
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("names", [("num_heads", "head_dim"), ("num_attention_heads", "attention_head_size")])
def test_whole_heads_go_where_the_code_says_how_wide_they_are(names):
    model, x = Viewed(*names, 3, 4).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3
    assert owned(group)["proj.weight@1"] == 4
    assert unsafe_groups(model, [group], x) == {}


MASKS = {
    "none": (lambda: None, {}),
    "constant": (lambda: nn.Buffer(torch.ones(7, 7).tril().log()), {}),
    "of truth values": (lambda: nn.Buffer(torch.ones(7, 7).tril().bool()), {}),
    "bias of every head": (lambda: nn.Parameter(normal(1, 3, 7, 7)), {"mask@1": 1}),
}


@pytest.mark.parametrize(("mask", "rides"), MASKS.values(), ids=MASKS.keys())
def test_whole_heads_go_whatever_the_mask(mask, rides):
    model, x = Masked(mask()).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3
    layers = {f"{layer}.{kind}@0": 4 for layer in "qkv" for kind in ("weight", "bias")}
    assert owned(group) == layers | {"proj.weight@1": 4, "num_heads@0": 1} | rides
    assert unsafe_groups(model, [group], x) == {}


NEIGHBOURS = {
    "on the left": lambda self, y: self.near.weight @ y,
    "on the right": lambda self, y: (y.mT @ self.near.weight).mT,
    "by name": lambda self, y: torch.einsum("nm,bmc->bnc", self.near.weight, y),
    "computed": lambda self, y: self.near.weight.softmax(1) @ y,
    "a vector": lambda self, y: torch.einsum("bnc,n->bnc", y, self.near.weight[0]),
}


@pytest.mark.parametrize("mixed", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_channels_pass_a_product_over_positions_with_what_is_stored(mixed):
    model = Wired(lambda self, x: self.head(mixed(self, self.a(x)).relu()).mean(1), near=nn.Embedding(7, 7))
    model.a, model.head = nn.Linear(4, 6), nn.Linear(6, 2)
    x = normal(3, 7, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6}
    assert owned(groups["a"]) == once("a.weight", "a.bias", "head.weight@1")
    assert unsafe_groups(model, [groups["a"]], x) == {}


def test_heads_stay_where_a_parameter_holds_something_for_each():
    def wiring(self, x):
        values = self.v(x).unflatten(2, (-1, 4)).transpose(1, 2)
        return self.proj((self.scores.weight.view(1, 3, 7, 7) @ values).transpose(1, 2).flatten(2))

    model = Wired(wiring, scores=nn.Embedding(3, 49), v=nn.Linear(5, 12), proj=nn.Linear(12, 5))
    assert free(groups_of(model, normal(2, 7, 5))) == {"v": 4}


def test_a_parameter_among_the_factors_of_attention_freezes_what_it_meets():
    def wiring(self, x):
        key, value = self.k(x).unsqueeze(1), self.v(x).unsqueeze(1)
        return self.head(F.scaled_dot_product_attention(self.query, key, value).flatten(1))

    model = Wired(wiring, k=nn.Linear(4, 6), v=nn.Linear(4, 5), head=nn.Linear(10, 2))
    model.query = nn.Parameter(normal(3, 1, 2, 6))
    groups = groups_of(model, normal(3, 7, 4))
    assert free(groups) == {"v": 5}
    assert "multiplies with a parameter" in groups["k"].frozen


def test_heads_that_share_a_key_have_no_rule():
    def wiring(self, x):
        q, k, v = (layer(x).unflatten(2, (-1, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    model = Wired(wiring, q=nn.Linear(4, 12), k=nn.Linear(4, 6), v=nn.Linear(4, 6), head=nn.Linear(12, 2))
    reasons = frozen(groups_of(model, normal(2, 7, 4)))
    assert all(reasons[name] == "no rule for aten.scaled_dot_product_attention.default" for name in "qkv")


def test_heads_that_the_code_counts_by_itself_are_found_by_the_trial():
    model, x = Attention(False, True).eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert unsafe_groups(model, [group], x).keys() == {group.name}


@pytest.mark.parametrize("equation", ["bid,bjd->bij", "bid,bjd->bji"])
def test_an_einsum_over_channels_reads_them(equation):
    def wiring(self, x):
        y = self.a(x)
        return torch.einsum(equation, y, self.b(x)) @ self.c(x)

    model = Wired(wiring, a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(4, 2))
    x = normal(2, 5, 4)
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6} and groups["a"].writers == ("a.weight", "b.weight")
    assert unsafe_groups(model, [groups["a"]], x) == {}


class WidthAttention(nn.Module):
    """Asks its attributes how wide a head is, and works with as many as there are; they may be as many as wide."""

    def __init__(self, heads, counted):
        super().__init__()
        width = 4 * heads
        self.head_dim, self.proj = 4, nn.Linear(width, 5)
        self.q, self.k, self.v = nn.Linear(5, width), nn.Linear(5, width), nn.Linear(5, width)
        if counted:
            self.num_heads = heads

    def forward(self, x):
        heads = [f(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for f in (self.q, self.k, self.v)]
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("heads", "counted"), [(3, False), (4, False), (4, True)])
def test_heads_are_also_found_by_their_width(heads, counted):
    model, x = WidthAttention(heads, counted).eval(), normal(2, 7, 5)
    groups = groups_of(model, x)
    assert free(groups) == {"q": heads} and groups["q"].writers == ("q.weight", "k.weight", "v.weight")
    assert {g.name: g.frozen for g in singe.inspect(model, x).groups} == {"q": None, "proj": "network output"}


def test_a_table_of_biases_loses_a_head_with_the_attention():
    model, x = BiasedAttention().eval(), normal(2, 7, 5)
    (group,) = (g for g in groups_of(model, x).values() if g.frozen is None)
    assert group.size == 3 and group.written("table").multiplicity == 1
    assert unsafe_groups(model, [group], x) == {}
