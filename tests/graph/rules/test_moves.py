import torch
from beside import Beside, inside, inside_all
from networks import images, shuffled
from torch import nn
from torch.nn import functional as F
from wiring import Wired, free, groups_of, normal, once, owned, unsafe_groups


def fixed(batch, channels, *size):
    return torch.full((batch, channels, *size), 0.5)


PADS = {
    "one side": (lambda y: F.pad(y, (0, 0, 0, 0, 0, 4)), 0),
    "both sides": (lambda y: F.pad(y, (0, 0, 0, 0, 3, 1)), 3),
    "ones": (lambda y: F.pad(y, (0, 0, 0, 0, 2, 2), value=1.0), 2),
    "zeros": (lambda y: torch.cat([y, torch.zeros(y.shape[0], 4, *y.shape[2:])], 1), 0),
    "new_zeros": (lambda y: torch.cat([y.new_zeros(y.shape[0], 4, *y.shape[2:]), y], 1), 4),
    "any constant": (lambda y: torch.cat([fixed(y.shape[0], 2, 8, 8), y, fixed(y.shape[0], 2, 8, 8)], 1), 2),
}


def convolutions(wiring, layers, width):
    """Some of them, and a head on what they come to."""
    return Wired(wiring, **{name: nn.Conv2d(*sizes) for name, sizes in layers.items()}, head=nn.Linear(width, 2))


def joined(pad):
    """Channels of ``a`` beside what ``pad`` puts there, in a sum with ``b``."""

    def wiring(self, x):
        y = self.a(x).relu()
        return self.head((pad(y) + self.b(y)).relu().mean((2, 3)))

    return wiring


def test_padded_channels_freeze_what_joins_them_and_not_what_stands_beside_them():
    layers = {"a": (3, 6, 1), "b": (6, 10, 1)}
    model = Beside({case: convolutions(joined(pad), layers, 10) for case, (pad, _) in PADS.items()})
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == inside_all({case: {"a": 6} for case in PADS})
    for case, (_, first) in PADS.items():
        a, b = (groups[f"networks.{case}.{name}"] for name in "ab")
        names = "a.weight", "a.bias", "b.weight", "b.bias", "b.weight@1", "head.weight@1"
        assert owned(a) == inside(case, once(*names))
        assert a.rows(f"networks.{case}.b.weight").flatten().tolist() == list(range(first, first + 6)), case
        assert b.size == 4 and b.frozen.startswith("joins constants of a fixed width (aten."), case
    assert unsafe_groups(model, [groups[f"networks.{case}.a"] for case in PADS], x) == {}


SHRINKING = {
    "zeros_like": lambda y: torch.cat([y, torch.zeros_like(y)], 1),
    "times zero": lambda y: torch.cat([y, y.mul(0)], 1),
}


def test_zeros_as_wide_as_a_layer_shrink_with_it():
    layers = {"a": (3, 6, 1), "b": (6, 12, 1)}
    model = Beside({case: convolutions(joined(pad), layers, 12) for case, pad in SHRINKING.items()})
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == inside_all({case: {"a": 6} for case in SHRINKING})
    for case in SHRINKING:
        rows = groups[f"networks.{case}.a"].rows(f"networks.{case}.b.weight")
        assert rows.tolist() == [[n, n + 6] for n in range(6)], case
    assert unsafe_groups(model, [groups[f"networks.{case}.a"] for case in SHRINKING], x) == {}


def test_constants_that_are_only_read_freeze_nothing():
    def wiring(self, x):
        y = self.a(x).relu()
        rows = torch.arange(8.0).view(1, 1, 8, 1).expand(y.shape[0], 1, 8, 8)
        return self.head(self.b(torch.cat([rows, y], 1)).relu().mean((2, 3)))

    model = Wired(wiring, a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(7, 5, 3), head=nn.Linear(5, 2))
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 6, "b": 5}
    assert groups["a"].read("b.weight").neuron.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert unsafe_groups(model, [groups["a"], groups["b"]], x) == {}


def test_a_depthwise_convolution_behind_padded_channels_keeps_its_rows_for_them():
    model = Wired(lambda self, x: self.head(self.d(F.pad(self.a(x), (0, 0, 0, 0, 1, 1))).mean((2, 3))))
    model.a, model.d, model.head = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert free(groups) == {"a": 4} and groups["d"].size == 2
    assert groups["a"].rows("d.weight").flatten().tolist() == [1, 2, 3, 4]
    assert unsafe_groups(model, [groups["a"]], x) == {}


SPATIAL = {
    "zeros": lambda y: F.pad(y, (1, 1, 2, 0)),
    "with ones": lambda y: F.pad(y, (1, 1), value=1.0),
    "cropped": lambda y: F.pad(y, (-1, -1)),
    "module": nn.ZeroPad2d(2),
    "rows of zeros": lambda y: torch.cat([y, torch.zeros(y.shape[0], y.shape[1], 2, y.shape[3])], 2),
    "columns like it": lambda y: torch.cat([torch.zeros_like(y[:, :, :, :1]), y], 3),
}


def test_padding_of_positions_freezes_nobody():
    def padded(pad):
        model = Wired(lambda self, x: self.head(self.b(pad(self.a(pad(x)).relu())).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
        model.b, model.head = nn.Conv2d(6, 5, 3), nn.Linear(5, 2)
        return model

    model, x = Beside({case: padded(pad) for case, pad in SPATIAL.items()}), images()[0]
    groups = groups_of(model, x)
    assert free(groups) == inside_all({case: {"a": 6, "b": 5} for case in SPATIAL})
    for case in SPATIAL:
        assert owned(groups[f"networks.{case}.a"]) == inside(case, once("a.weight", "a.bias", "b.weight@1"))
    assert unsafe_groups(model, [g for g in groups.values() if g.frozen is None], x) == {}


def test_padding_of_positions_that_were_channels_freezes_nobody():
    model = Wired(lambda self, x: self.head(self.b(F.pad(F.pixel_shuffle(self.a(x).relu(), 2), (1, 1))).mean((2, 3))))
    model.a, model.b, model.head = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 5, 3), nn.Linear(5, 2)
    assert free(groups_of(model, images()[0])) == {"a": 2, "b": 5}


def test_constants_beside_a_single_channel_freeze_what_joins_them():
    model = Wired(joined(lambda y: F.pad(y, (0, 0, 0, 0, 1, 2))), a=nn.Conv2d(3, 1, 1), b=nn.Conv2d(1, 4, 1))
    model.head = nn.Linear(4, 2)
    assert free(groups_of(model, images()[0])) == {"a": 1}


def test_padding_with_positions_freezes_nobody():
    def padded(mode):
        model = Wired(lambda self, x: self.head(self.b(self.a(x).relu()).mean((2, 3))), a=nn.Conv2d(3, 6, 1))
        model.b, model.head = nn.Conv2d(6, 5, 3, padding=1, padding_mode=mode), nn.Linear(5, 2)
        return model

    modes = "reflect", "replicate", "circular"
    groups = groups_of(Beside({mode: padded(mode) for mode in modes}), images()[0])
    assert free(groups) == inside_all({case: {"a": 6, "b": 5} for case in modes})


def turned(count):
    return torch.arange(count).flip(0)


def twos(count):
    return torch.full((count,), 2)


def empty(y):
    return y[:, :0].flatten(2).unflatten(2, y.shape[2:])


MOVES = {
    "permute": (lambda self, y: self.lin(y.permute(0, 2, 3, 1)).mean((1, 2)), 8, 1),
    "tokens": (lambda self, y: self.lin(y.flatten(2).transpose(1, 2)).mean(1), 8, 1),
    "pixel shuffle": (lambda self, y: self.lin(F.pixel_shuffle(y, 2).mean((2, 3))), 2, 1),
    "flip and roll": (lambda self, y: self.lin(y.flip(-1).roll(1, 2).mean((2, 3))), 8, 1),
    "twice": (lambda self, y: self.lin(torch.cat([y, y], 1).amax((2, 3))), 8, 2),
    "flatten": (lambda self, y: self.lin(F.adaptive_max_pool2d(y, 2).reshape(y.shape[0], -1)), 8, 4),
    "squeeze": (lambda self, y: self.lin(y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1)), 8, 1),
    "stack": (lambda self, y: self.lin(torch.stack([y, y.relu()], 0).sum(0).mean((2, 3))), 8, 1),
    "pool": (lambda self, y: self.lin(F.avg_pool2d(F.max_pool2d(y, 2), 2).flatten(1)), 8, 1),
    "repeat": (lambda self, y: self.lin(y.repeat(1, 1, 2, 2).mean((2, 3))), 8, 1),
    "picked": (lambda self, y: self.lin(y.amax((2, 3)).index_select(1, turned(y.shape[1]))), 8, 1),
    "indexed": (lambda self, y: self.lin(y.amax((2, 3))[:, turned(y.shape[1])]), 8, 1),
    "repeated so often": (lambda self, y: self.lin(y.amax((2, 3)).repeat_interleave(twos(y.shape[1]), 1)), 8, 2),
    "beside nothing": (lambda self, y: self.lin(torch.cat([empty(y), y], 1).amax((2, 3))), 8, 1),
}


def test_data_movement_moves_owners():
    def moved(move, size, columns):
        model = Wired(lambda self, x: self.head(move(self, self.a(x).relu()).relu()), a=nn.Conv2d(3, 8, 1))
        model.lin, model.head = nn.Linear(size * columns, 5), nn.Linear(5, 2)
        return model

    model, x = Beside({case: moved(*known) for case, known in MOVES.items()}), images(4, size=4)[0]
    groups = groups_of(model, x)
    assert free(groups) == inside_all({case: {"a": size, "lin": 5} for case, (_, size, _) in MOVES.items()})
    for case, (_, size, columns) in MOVES.items():
        rows = 8 // size
        expected = {"a.weight@0": rows, "a.bias@0": rows, "lin.weight@1": columns}
        assert owned(groups[f"networks.{case}.a"]) == inside(case, expected)
    assert unsafe_groups(model, [g for g in groups.values() if g.frozen is None], x) == {}


def test_channels_shuffled_between_grouped_convolutions_go_with_their_places_in_both():
    def between(shuffle):
        model = Wired(lambda self, x: self.head(self.h(shuffle(self.g(x).relu())).mean((2, 3))))
        model.g, model.h, model.head = nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 3, groups=2), nn.Linear(4, 2)
        return model

    model = Beside({"views": between(lambda y: shuffled(y, 2)), "module": between(nn.ChannelShuffle(2))})
    x = images(channels=4)[0]
    groups = groups_of(model, x)
    assert free(groups) == inside_all({case: {"g": 2, "h": 2} for case in model.networks})
    for case in model.networks:
        # rows 0 to 3 and 4 to 7 are its groups; shuffled, they are 0 4 1 5 and 2 6 3 7
        g = groups[f"networks.{case}.g"]
        assert g.rows(f"networks.{case}.g.weight").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
        assert g.read(f"networks.{case}.h.weight").neuron.tolist() == [0, 0, 1, 1]
    assert unsafe_groups(model, [g for g in groups.values() if g.frozen is None], x) == {}


def test_channels_shuffled_behind_an_ordinary_convolution_go_with_their_places_in_both_halves():
    model = Wired(lambda self, x: self.head(self.b(shuffled(self.a(x).relu(), 2)).mean((2, 3))), a=nn.Conv2d(3, 8, 1))
    model.b, model.head = nn.Conv2d(8, 5, 3), nn.Linear(5, 2)
    x = images()[0]
    groups = groups_of(model, x)
    assert unsafe_groups(model, [groups["a"]], x) == {}
    assert groups["a"].rows("a.weight").tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]


CASTS = {
    "by name": lambda y: y.float(),
    "to a dtype": lambda y: y.to(torch.float32),
    "to another": lambda y: y.to(torch.zeros(1)),
    "there and back": lambda y: y.double().float(),
}


def test_a_cast_changes_nobody():
    def through(cast):
        return Wired(lambda self, x: self.b(cast(self.a(cast(x)).relu())), a=nn.Linear(4, 6), b=nn.Linear(6, 2))

    model, x = Beside({case: through(cast) for case, cast in CASTS.items()}), normal(3, 4)
    groups = groups_of(model, x)
    assert free(groups) == inside_all({case: {"a": 6} for case in CASTS})
    assert unsafe_groups(model, [groups[f"networks.{case}.a"] for case in CASTS], x) == {}
