import copy
import math

import pytest
import torch
from beside import Beside
from folds import conv, double, error, folded, norm, norms, settled
from networks import DigitNet, MobileNet, PlainNet, PreActNet, ResNeXt, images, randomised, shuffled
from states import random_states, same, snapshot
from torch import nn
from torch.nn import functional as F
from wiring import Wired, normal

import singe

# -- what folds --------------------------------------------------------------------------------------------------

PAIRS = [("biased", "n1"), ("bare", "n2"), ("grouped", "n3"), ("deep", "n4"), ("line", "n5"), ("space", "n6"),
         ("flat", "n7")]  # fmt: skip


def every_kind():
    """Each kind of layer that a batch norm can be folded into, with and without bias."""

    def wiring(self, x):
        y = self.n2(self.bare(self.n1(self.biased(x)).relu())).relu()
        y = self.n4(self.deep(self.n3(self.grouped(y)).relu())).relu()
        line = self.n5(self.line(y.flatten(2))).tanh().mean(2)
        space = self.n6(self.space(y[:, :, None])).tanh().mean((2, 3, 4))
        return self.head(self.n7(self.flat(torch.cat([line, space], 1))).relu())

    return settled(Wired(
        wiring,
        biased=nn.Conv2d(3, 6, 3, stride=2, padding=1), n1=nn.BatchNorm2d(6),
        bare=nn.Conv2d(6, 6, 3, padding="same", padding_mode="circular", bias=False),
        n2=nn.BatchNorm2d(6, affine=False, eps=0.1),
        grouped=nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), n3=nn.BatchNorm2d(4),
        deep=nn.Conv2d(4, 8, 3, padding=1, groups=4), n4=nn.BatchNorm2d(8, momentum=None),
        line=nn.Conv1d(8, 3, 5, bias=False), n5=nn.BatchNorm1d(3),
        space=nn.Conv3d(8, 4, (1, 2, 2)), n6=nn.BatchNorm3d(4),
        flat=nn.Linear(7, 5, bias=False), n7=nn.BatchNorm1d(5), head=nn.Linear(5, 4),
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_outputs_stay_the_same_and_weights_are_those_of_the_formula(dtype):
    model = every_kind().to(dtype)
    folding = folded(model, images()[0].to(dtype))
    assert folding.folded == tuple(behind for _, behind in PAIRS) and folding.unfolded == {}
    for name, behind in PAIRS:
        layer, bn, new = model.get_submodule(name), model.get_submodule(behind), folding.model.get_submodule(name)
        a = (bn.running_var.double() + bn.eps) ** -0.5 * (bn.weight.double() if bn.affine else 1)
        bias = 0 if layer.bias is None else layer.bias.double()
        shift = a * (bias - bn.running_mean.double()) + (bn.bias.double() if bn.affine else 0)
        weight = layer.weight.double() * a.view(-1, *[1] * (layer.weight.dim() - 1))
        assert new.weight.dtype == new.bias.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        assert error(new.weight, weight) < tolerance and error(new.bias, shift) < 4 * tolerance, name


def test_a_folded_network_exports_trains_and_answers_alike_for_other_inputs():
    model = settled(randomised(DigitNet(3)).double())
    folding = folded(model, images(2, channels=1)[0].double())
    assert len(folding.folded) == len(norms(model)) == 9
    x, y = images(7, channels=1, seed=6)
    x = x.double()
    program = torch.export.export(folding.model, (x,)).module()
    for network in (folding.model, program):
        assert error(network(x), model(x)) < 1e-12
    F.cross_entropy(folding.model(x), y).backward()
    assert all(p.grad.isfinite().all() for p in folding.model.parameters())


def test_a_network_without_batch_norm_is_only_copied():
    model = Wired(lambda self, x: self.a(x).relu(), a=nn.Linear(4, 3))
    folding = folded(model, normal(2, 4))
    assert (folding.folded, folding.unfolded) == ((), {})
    assert folding.model is not model and same(folding.model.state_dict(), model.state_dict())


# -- roots and leaves ---------------------------------------------------------------------------------------------


def two(self, x):
    return self.a(x), self.b(x)


CLOSING = {
    "behind a concatenation": (
        lambda self, x: self.n(torch.cat(two(self, x), 1)).relu(),
        {"a": conv(3, 2), "b": conv(3, 4, bias=False), "n": norm(6)},
    ),
    "behind a concatenation with zeros": (
        lambda self, x: self.c(torch.cat([u := self.n(self.a(x)), torch.zeros_like(u)], 1)).relu(),
        {"a": conv(3, 4), "n": norm(), "c": conv(8, 2)},
    ),
    "behind a sum": (lambda self, x: self.n(sum(two(self, x))).relu(), {"a": conv(3, 4), "b": conv(3, 4), "n": norm()}),
    "behind a sum of which one part reaches zero padding": (
        lambda self, x: self.n(torch.add(u := self.a(x), self.b(x), alpha=-2)).relu() + self.p(u).relu(),
        {"a": conv(3, 4), "b": conv(3, 4), "n": norm(), "p": conv(4, 4, 3, padding=1)},
    ),
    "behind a sum of one": (lambda self, x: self.n((u := self.a(x)) + u).relu(), {"a": conv(3, 4), "n": norm()}),
    "behind sums of sums": (
        lambda self, x: self.n((self.a(x) - 3 * self.b(x)) / 2 + self.c(x)).relu(),
        {"a": conv(3, 4), "b": conv(3, 4, bias=False), "c": conv(3, 4), "n": norm()},
    ),
    "behind a layer that others read": (
        lambda self, x: self.n(u := self.a(x)).relu() + self.b(u).relu(),
        {"a": conv(3, 4), "n": norm(), "b": conv(4, 4, bias=False)},
    ),
    "in front of what others write": (
        lambda self, x: self.c(self.n(self.b(x).relu()) + self.a(x)).relu(),
        {"a": conv(3, 4, bias=False), "b": conv(3, 4), "n": norm(), "c": conv(4, 2, 3)},
    ),
    "in front of what others write where zero padding follows": (
        lambda self, x: self.c(self.n(self.b(x).relu()) + self.a(x)).relu(),
        {"a": conv(3, 4, bias=False), "b": conv(3, 4), "n": norm(), "c": conv(4, 2, 3, padding=1)},
    ),
    "scale into the layer in front, shift into the one behind": (
        lambda self, x: self.b(self.n(u := self.a(x))).relu() + self.p(u).relu(),
        {"a": conv(3, 4), "n": norm(), "b": conv(4, 2), "p": conv(4, 2, 3, padding="same")},
    ),
    "between the input and a layer": (lambda self, x: self.a(self.n(x)), {"n": norm(3), "a": conv(3, 4, 3)}),
    "between a layer and the output": (lambda self, x: self.n(self.a(x)), {"a": conv(3, 4, 3, padding=1), "n": norm()}),
    "two in a row": (lambda self, x: self.m(self.n(self.a(x))).relu(), {"m": norm(), "a": conv(3, 4), "n": norm()}),
    "two in a row in front of a layer": (
        lambda self, x: self.a(self.m(self.n(x.relu()))).relu(),
        {"n": norm(3, affine=False), "m": norm(3), "a": conv(3, 4)},
    ),
    "called twice": (
        lambda self, x: self.b(self.n(self.a(x).relu())).relu() + self.n(self.c(x)).relu(),
        {"a": conv(3, 4), "n": norm(), "b": conv(4, 4, 2, stride=1), "c": conv(3, 4, 2)},
    ),
    "called twice on the same": (
        lambda self, x: self.n(u := self.a(x)).relu() + self.n(u).tanh() + self.b(u),
        {"a": conv(3, 4), "n": norm(), "b": conv(4, 4)},
    ),
    "in front of zero padding that gets no shift": (
        lambda self, x: self.a(self.n(x.relu())).relu(), {"n": norm(3), "a": conv(3, 4, 3, padding=1)},
    ),
    "behind a transposed convolution": (
        lambda self, x: self.n(self.a(x)).relu(),
        {"a": nn.ConvTranspose2d(3, 6, 3, stride=2, padding=1, groups=3, bias=False), "n": norm(6)},
    ),
    "behind a transposed convolution in one group": (
        lambda self, x: self.n(self.a(x)).relu(), {"a": nn.ConvTranspose2d(3, 4, 2), "n": norm()},
    ),
    "in front of grouped convolutions": (
        lambda self, x: self.a(self.n(x.repeat(1, 4, 1, 1).relu())).relu(),
        {"n": norm(12), "a": conv(12, 6, 3, groups=3)},
    ),
    "in front of depthwise convolutions": (
        lambda self, x: self.a(self.n(x.relu())).relu(), {"n": norm(3), "a": conv(3, 6, (3, 1), groups=3, bias=False)},
    ),
    "between layers of vectors": (
        lambda self, x: self.b(self.n(self.a(x.flatten(1)).relu())),
        {"a": nn.Linear(192, 6), "n": nn.BatchNorm1d(6), "b": nn.Linear(6, 2, bias=False)},
    ),
    "linear along another axis": (
        lambda self, x: self.n(self.a(x.flatten(2)).transpose(1, 2)).relu(),
        {"a": nn.Linear(64, 5), "n": nn.BatchNorm1d(5)},
    ),
    "along the only channel": (
        lambda self, x: self.n(self.a(x.flatten(2).mean(1, keepdim=True))).relu(),
        {"a": nn.Linear(64, 5), "n": nn.BatchNorm1d(1)},
    ),
    "tiny variances": (lambda self, x: self.n(self.a(x)).relu(), {"a": conv(3, 4), "n": norm(4, eps=1e-12)}),
    "a scale of zero in front": (lambda self, x: self.n(self.a(x)).relu(), {"a": conv(3, 4), "n": norm()}),
    "a scale of zero behind": (lambda self, x: self.a(self.n(x.relu())).relu(), {"n": norm(3), "a": conv(3, 4)}),
    "only a weight": (lambda self, x: self.n(self.a(x)).relu(), {"a": conv(3, 4, bias=False), "n": norm()}),
}  # fmt: skip


def test_where_the_search_closes_all_fold():
    networks = {case: double(wiring, **copy.deepcopy(modules)) for case, (wiring, modules) in CLOSING.items()}
    n = networks["in front of zero padding that gets no shift"].n
    n.bias.data.copy_(n.weight * n.running_mean / (n.running_var + n.eps).sqrt())
    networks["tiny variances"].n.running_var.copy_(torch.tensor([1e-9, 1e-6, 0, 1]))
    for case in ("a scale of zero in front", "a scale of zero behind"):
        networks[case].n.weight.data[1] = 0
    networks["only a weight"].n.bias = None
    assert folded(Beside(networks), images()[0].double()).unfolded == {}


def channels(operator):
    return operator(torch.zeros(1, 4, 8, 8)).shape[1]


OPERATORS = {
    "average pool": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "average pool that leaves out padding": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "average pool of lines": lambda x: F.avg_pool1d(x.flatten(2), 5)[..., None],
    "average pool of volumes": lambda x: F.adaptive_avg_pool3d(x[:, :, None], 2).flatten(3),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "nearest-exact": lambda x: F.interpolate(x, size=5, mode="nearest-exact"),
    "bilinear": lambda x: F.interpolate(x, size=11, mode="bilinear"),
    "dropout": lambda x: F.dropout2d(F.dropout(x, training=False), training=False),
    "flatten": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)[:, :, None, None],
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 3),
    "flip and roll": lambda x: x.flip(1).roll(1, 1),
    "shuffle": lambda x: shuffled(x, 2),
    "channel shuffle": lambda x: F.channel_shuffle(x, 2),
    "split and concatenate": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "unbind and stack": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "slice": lambda x: x[:, 1:, ::2, 2:],
    "reflection": lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "wrapping": lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
    "cropping": lambda x: F.pad(x, (-1, -2, 0, 0)),
    "negative half": lambda x: -x / 2,
    "nothing added": lambda x: sum([x]) - 0,
    "sum with itself": lambda x: x + x.flip(2),
}


def on_the_way(operator):
    def wiring(self, x):
        u = self.root(x)
        in_front, undone = self.n(operator(u)).relu(), self.leaf(operator(u)).tanh()
        return self.head(operator(self.m(in_front.sum(1, keepdim=True).expand(-1, 4, -1, -1)))) + undone.mean()

    width = channels(operator)
    return double(
        wiring, root=conv(3, 4), n=norm(width), leaf=conv(width, 3), m=norm(), head=conv(width, 3, bias=False)
    )


def test_operators_on_the_way():
    model = Beside({name: on_the_way(operator) for name, operator in OPERATORS.items()})
    assert folded(model, images(size=12)[0].double()).unfolded == {}


def random_network(seed):
    """Layers with batch norms anywhere between them, among operators, sums and concatenations that let them through."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList()
            for _ in range(4):
                self.parts.append(draw(conv(4, 4), conv(4, 4, groups=2, bias=False), nn.ConvTranspose2d(4, 4, 1)))
                for _ in range(draw(1, 2, 3)):
                    self.parts.append(draw(norm(), norm(4, affine=False), Passing(draw(*names)), Branch(draw(1, 2))))
                self.parts.append(draw(nn.ReLU(), nn.Identity()))

        def forward(self, x):
            x = torch.cat([x, x.mean(1, keepdim=True)], 1)
            for part in self.parts:
                x = part(x)
            return x.exp().mean((2, 3))

    names = [n for n in OPERATORS if channels(OPERATORS[n]) == 4 and n not in ("sum with itself", "cropping")]
    return settled(randomised(Chain()))


class Passing(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.operator = OPERATORS[name]

    def forward(self, x):
        return F.interpolate(self.operator(x), size=8)


class Branch(nn.Module):
    """Adds a layer to batch norms, or concatenates it with them."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.beside, self.norm = kind, conv(4, 4), norm()
        self.join = conv(8, 4)

    def forward(self, x):
        y = self.norm(self.beside(x))
        return x + y if self.kind == 1 else self.join(torch.cat([x, y], 1))


@pytest.mark.parametrize("seed", range(8))
def test_random_networks_fold_and_answer_alike(seed):
    folding = folded(random_network(seed).double(), images()[0].double())
    assert all("both reads and writes" in reason for reason in folding.unfolded.values())
    assert len(folding.folded) >= 2


# -- promises ----------------------------------------------------------------------------------------------------


class InPlace(PlainNet):
    def forward(self, x):
        return super().forward(x.mul_(2))


def test_the_network_its_modes_the_example_and_the_random_state_are_as_before():
    model, (x, y) = randomised(InPlace()), images()
    F.cross_entropy(model(x.clone()), y).backward()
    model.train()
    model.features[1].eval()
    model.features[0].requires_grad_(False)
    before, state, example = snapshot(model), random_states(), x.clone()
    folding = singe.fold_batchnorm(model, x.requires_grad_())
    assert same(snapshot(model), before) and same(random_states(), state)
    assert torch.equal(x, example) and x.grad is None
    assert [(n, m.training) for n, m in folding.model.named_modules()] == [
        (n, m.training) for n, m in model.named_modules()
    ]
    assert type(folding.model.features[1]) is nn.Identity and not folding.model.features[1].training
    trained = {n: p.requires_grad for n, p in folding.model.named_parameters()}
    frozen = {"features.0.weight", "features.0.bias"}
    assert {n for n, needed in trained.items() if not needed} == frozen
    assert "features.4.bias" in trained  # born of a batch norm
    shared = {p.data_ptr() for p in folding.model.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared


def test_memory_format_dtype_and_what_trains_are_kept():
    model = double(
        lambda self, x: self.n(u := self.a(x)).relu() + self.b(u).relu(),
        a=conv(3, 4, 3, bias=False), n=norm(), b=conv(4, 4, 3, padding="valid"),
    )  # fmt: skip
    model.wiring = lambda self, x: self.n(u := self.a(x)).relu()[:, :, 1:-1, 1:-1] + self.b(u).relu()
    model.to(memory_format=torch.channels_last).b.weight.requires_grad_(False)
    new = folded(model, images()[0].double()).model
    for layer in (new.a, new.b):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert [p.requires_grad for p in (new.a.weight, new.a.bias, new.b.weight, new.b.bias)] == [True, True, False, True]
    assert {p.dtype for p in new.parameters()} == {torch.float64}


def test_folded_networks_prune_and_pruned_ones_fold():
    model, batch = randomised(PlainNet()), images(8)
    options = {"finetune": None, "images": 8, "progress": False, "criterion": "magnitude", "allocation": "uniform"}
    pruned = singe.prune(model, [batch], 0.4, **options).model
    folding = folded(pruned, batch[0])
    assert folding.folded == ("features.1", "features.5")
    again = singe.prune(folded(model, batch[0]).model, [batch], 0.4, **options)
    assert again.params_removed == pytest.approx(0.4, abs=0.02)
    assert [m.shape for m in again.model.parameters()] == [m.shape for m in folding.model.parameters()]


def test_a_network_that_takes_more_than_a_tensor_folds_with_forward():
    def wiring(self, pair):
        return self.n(self.a(pair["x"])).relu() + pair["shift"]

    class Named(Wired):
        def forward(self, x, shift):
            return wiring(self, {"x": x, "shift": shift})

    model = settled(Named(wiring, a=nn.Linear(4, 5), n=nn.BatchNorm1d(5)).double())
    example = {"late": normal(3, 5, dtype=torch.float64), "early": normal(3, 4, seed=8, dtype=torch.float64)}

    def forward(network, batch):
        return network(batch["early"], shift=batch["late"])

    folding = singe.fold_batchnorm(model, example, forward=forward)
    assert folding.folded == ("n",)
    assert error(forward(folding.model, example), forward(model, example)) < 1e-12


X = images()[0]


@pytest.mark.parametrize(
    ("example", "kind", "message"),
    [
        (X * math.nan, ValueError, "NaN"),
        (X.clone().fill_(math.inf), ValueError, "infinity"),
        (X[:, :2], ValueError, r"fit PlainNet.*\(5, 2, 8, 8\)"),
        (X.double(), ValueError, r"fit PlainNet.*float64"),
        (images(), TypeError, "tensor x, got tuple"),
        (X[:0], ValueError, r"length, at least 1, got \(\(0, 3, 8, 8\)"),
        (torch.tensor(1.0), ValueError, "length, at least 1"),
        (X.numpy(), TypeError, "tensor x, got ndarray"),
        (None, TypeError, "tensor x, got NoneType"),
        ([], TypeError, "tensor x, got list"),
    ],
    ids=["nan", "inf", "channels", "dtype", "pair", "empty", "scalar", "numpy", "None", "list"],
)
def test_an_example_that_is_none_is_refused(example, kind, message):
    with pytest.raises(kind, match=message):
        singe.fold_batchnorm(randomised(PlainNet()), example)


def test_what_is_no_sound_network_is_refused():
    broken = randomised(PlainNet())
    broken.features[5].running_var[2] = math.nan
    for model, kind, message in [
        ("PlainNet", TypeError, r"Module, got str"),
        (PlainNet, TypeError, r"Module, got type"),
        (nn.ReLU(), ValueError, "no parameters"),
        (broken, ValueError, r"NaN in features\.5\.running_var"),
    ]:
        with pytest.raises(kind, match=message):
            singe.fold_batchnorm(model, X)


@pytest.mark.parametrize("make", [DigitNet, MobileNet, ResNeXt, PreActNet], ids=lambda make: make.__name__)
def test_a_fresh_network_folds_into_what_takes_the_weights_of_a_trained_one(make):
    x = images(4, channels=1 if make is DigitNet else 3)[0]
    trained, fresh = (singe.fold_batchnorm(model.eval(), x).model for model in (randomised(make()), make()))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))
