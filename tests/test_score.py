import copy
import math
from dataclasses import dataclass

import pytest
import torch
from networks import (
    MLP,
    DenseNet,
    DigitNet,
    ExciteNet,
    FlattenNet,
    MobileNet,
    OptionANet,
    PlainNet,
    PreActNet,
    ResNeXt,
    images,
    randomised,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F

import singe
from singe import reference
from singe.criteria import WeightCriterion
from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.removal.plan import Plan

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


class SameNet(nn.Module):
    """Even kernels with padding='same', dilated; a grouped convolution; channels that flatten into columns."""

    def __init__(self):
        super().__init__()
        self.even = nn.Conv2d(3, 5, (4, 2), padding="same", dilation=(1, 3))
        self.next = nn.Conv2d(5, 4, (2, 4), padding="same", bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, padding="valid", groups=2)
        self.head = nn.Conv2d(6, 4, 2, stride=4)

    def forward(self, x):
        y = F.relu(self.even(x))
        return self.head(F.relu(self.grouped(F.relu(self.bn(self.next(y)))))).flatten(1)


class ReversedSum(nn.Module):
    """Channel i of one layer and channel 4 - i of the other are one neuron."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(F.relu(self.a(x) + self.b(x).flip(1)).mean((2, 3)))


class ManyRows(nn.Module):
    """Neurons with several rows each: four by a pixel shuffle, two by a gate."""

    def __init__(self):
        super().__init__()
        self.up = nn.Conv2d(3, 12, 3)
        self.gated = nn.Conv2d(3, 10, 3, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        y = F.relu(F.pixel_shuffle(self.up(x), 2))
        a, b = self.gated(y).chunk(2, 1)
        return self.head((a * b.sigmoid()).mean((2, 3)))


class OtherRanks(nn.Module):
    """Convolutions in one and three dimensions, with batch norm behind the first."""

    def __init__(self):
        super().__init__()
        self.one, self.bn = nn.Conv1d(3, 5, 4, stride=2, bias=False), nn.BatchNorm1d(5)
        self.three = nn.Conv3d(1, 4, (2, 3, 2), padding=(1, 0, 1), dilation=(1, 2, 1))

    def forward(self, x):
        y = F.relu(self.bn(self.one(x.flatten(2))))  # [B, 5, 31]
        return self.three(y[:, :, :30].reshape(-1, 1, 5, 5, 6)).mean((2, 3, 4))


class TwoOutputs(nn.Module):
    """Logits, and on the way ``extra``: a second head on the middle layer, a scalar, a number, a plain activation."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.first, self.middle, self.head = nn.Linear(10, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.aux = nn.Linear(6, 4)

    def forward(self, x):
        y = self.first(x).relu()
        logits = self.head(self.middle(y).relu())
        if self.extra == "head":
            return {"logits": logits, "extra": self.aux(y)}
        if self.extra == "scalar":
            return {"logits": logits, "extra": y.square().mean()}
        if self.extra == "number":
            return {"logits": logits, "extra": 2.0}
        return logits, y


class Centred(nn.Module):
    """Samples see each other in the middle of the network, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.middle, self.head = nn.Linear(10, 6), nn.Linear(6, 5), nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(6, affine=False, track_running_stats=False)

    def forward(self, x):
        y = self.first(x).tanh()
        if self.how == "mean":
            y = y - y.mean(0)
        elif self.how == "batch statistics":
            y = self.norm(y)
        elif self.how == "neighbour":
            y = y + y.roll(1, 0)
        else:
            y = (y @ y.T).softmax(1) @ y
        return self.head(self.middle(y).tanh())


class FixedBatch(MLP):
    def forward(self, x):
        return self.layers(x).reshape(5, 4)


class CountedBatch(MLP):
    def forward(self, x):
        return self.layers(x) * torch.ones(len(x), 4)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(10, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.first(x.transpose(0, 1)).relu()).mean(0)


class InPlaceOnInput(MLP):
    def forward(self, x):
        return self.layers(x.sub_(0.5))


class NormOverTime(nn.Module):
    """A batch norm whose channels are not those of the linear layer in front of it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(10, 6), nn.BatchNorm1d(7), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.norm(self.first(x)).relu()).mean(1)


def vectors(count=5, *time):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, *time, 10, generator=generator), torch.randint(4, (count,), generator=generator)


@dataclass(frozen=True)
class Distance(WeightCriterion):
    """To all other rows (He et al. 2019): a criterion of one's own, of more than each row by itself."""

    def of_rows(self, rows):
        return torch.cdist(rows, rows).sum(1)


TWO = singe.GaussLegendre(2)
PATHS = [(kind, path) for kind in (singe.SummedGradient, singe.IntegratedGradient) for path in ("neuron", "layer")]
FEW = [
    singe.LossChange(),
    singe.Magnitude(1),
    singe.IntegratedGradient(quadrature=singe.Geometric(0.7, steps=1)),
    singe.IntegratedGradient(math.inf, TWO, "layer"),
    singe.SummedGradient(1, TWO),
]
FOUR = [
    singe.LossChange(),
    singe.Magnitude(),
    singe.IntegratedGradient(quadrature=TWO),
    singe.SummedGradient(math.inf, TWO, "layer"),
]
EVERY = [
    *FEW,
    Distance(),
    *(kind(p) for kind in (singe.Magnitude, singe.Gradient, singe.MagnitudeGradient) for p in (1, 2, math.inf)),
    *(kind(p, TWO, path) for kind, path in PATHS for p in (1, 2, math.inf)),
]


def error(actual, expected):
    assert actual.dtype == expected.dtype == torch.float64
    assert actual.shape == expected.shape
    assert expected.norm() > 0
    return float((actual - expected).norm() / expected.norm())


NETWORKS = [
    (PlainNet, images, ["features.0", "features.4", "features.7", "classifier.0", "classifier.3"], FEW),
    (FlattenNet, images, ["conv", "hidden"], FEW),
    (SameNet, images, ["even", "next", "grouped", "head"], EVERY),
    (lambda: DigitNet(3), lambda: images(channels=1), ["stem", "blocks.0.conv1", "blocks.2.conv2"], FEW),
    (PreActNet, images, ["stem", "conv1"], FEW),
    (MLP, vectors, ["layers.0", "layers.2", "layers.4"], EVERY),
    (MLP, lambda: vectors(4, 3), ["layers.0", "layers.4"], FEW),
    (ReversedSum, images, ["a"], FEW),
    (ManyRows, images, ["up", "gated"], FEW),
    (OtherRanks, images, ["one", "three"], FEW),
    (MobileNet, images, ["stem.0", "down.0", "down.4", "block.0"], FOUR),
    (ResNeXt, images, ["stem", "conv1", "conv2", "before", "behind"], FOUR),
    (ExciteNet, images, ["expand", "fc1", "conv"], FOUR),
    (OptionANet, images, ["stem", "conv1", "conv2", "last"], FOUR),
    (DenseNet, images, ["stem", "first", "second"], FOUR),
]
IDS = [
    "plain", "flatten", "same", "residual", "preact", "vectors", "sequences", "reversed", "rows", "ranks", "mobile",
    "grouped", "excite", "padded", "dense",
]  # fmt: skip


@pytest.mark.parametrize(("make", "data", "layers", "criteria"), NETWORKS, ids=IDS)
def test_scores_equal_the_reference_in_float64(make, data, layers, criteria, one_export):
    exact, (x, y) = randomised(make()).double(), data()
    models = {dtype: copy.deepcopy(exact).to(dtype) for dtype in TOLERANCE}
    for criterion in criteria:
        found = {dtype: singe.score(model, (x.to(dtype), y), criterion=criterion) for dtype, model in models.items()}
        for layer in layers:
            expected = reference.score(exact, (x.double(), y), layer, criterion=criterion)
            for dtype, scores in found.items():
                assert error(scores[layer], expected) <= TOLERANCE[dtype], (layer, criterion, dtype)


def test_integrated_gradient_is_equation_5_written_out():
    model, (x, y) = randomised(MLP()).double(), vectors()
    x, layer = x.double(), model.layers[2]
    expected = torch.zeros(9, dtype=torch.float64)
    for n in range(9):
        for s in range(4):
            faded = copy.deepcopy(model)
            with torch.no_grad():
                faded.layers[2].weight[n] *= 0.6**s
                faded.layers[2].bias[n] *= 0.6**s
            F.cross_entropy(faded(x), y).backward()
            grad = faded.layers[2].weight.grad[n]
            expected[n] += 0.6**s * layer.weight[n].detach().norm() * grad.norm()
    criterion = singe.IntegratedGradient(quadrature=singe.Geometric(0.6, steps=3))
    assert error(singe.score(model, (x, y), "layers.2", criterion=criterion), expected) < 1e-12


@pytest.mark.parametrize(
    ("make", "data", "by_norm", "layer"),
    [
        (PlainNet, images, "features.5", "features.4"),
        (lambda: DigitNet(3), lambda: images(channels=1), "blocks.1.down.1", "blocks.1.conv2"),
        (PreActNet, images, "bn3", "stem"),
    ],
)
def test_a_batch_norm_stands_for_the_neurons_that_pass_through_it(make, data, by_norm, layer, one_export):
    model = randomised(make())
    assert torch.equal(singe.score(model, data(), by_norm), singe.score(model, data(), layer))


def test_coupled_neurons_are_ordered_by_the_rows_of_the_layer_asked_for(one_export):
    model, batch = randomised(ReversedSum()), images()
    for criterion in ("magnitude", "integrated_gradient"):
        a, b = (singe.score(model, batch, layer, criterion=criterion) for layer in "ab")
        assert torch.equal(a, b.flip(0))
    rows_a, rows_b = (layer.weight.detach().double().flatten(1).norm(dim=1) for layer in (model.a, model.b))
    assert torch.allclose(singe.score(model, batch, "a", criterion="magnitude"), rows_a + rows_b.flip(0))


def test_magnitude_is_that_of_the_weights_with_their_batch_norm_folded_in(one_export):
    model = randomised(PlainNet())
    conv, norm = model.features[0], model.features[1]
    folded = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None, None]
    for p in (1, 2, math.inf):
        expected = torch.linalg.vector_norm(folded.detach().double().flatten(1), p, dim=1)
        actual = singe.score(model, images(), "features.0", criterion=singe.Magnitude(p))
        assert error(actual, expected) < 1e-6


def test_loss_change_is_that_of_a_real_removal():
    model, (x, y) = randomised(PlainNet()).double(), images()
    x, keep = x.double(), torch.tensor([0, 1, 3, 4, 5])
    smaller = copy.deepcopy(model)
    smaller.features[7].weight.data = smaller.features[7].weight[keep]
    smaller.features[7].bias.data = smaller.features[7].bias[keep]
    smaller.classifier[0].weight.data = smaller.classifier[0].weight[:, keep]
    expected = F.cross_entropy(smaller(x), y) - F.cross_entropy(model(x), y)
    actual = singe.score(model, (x, y), "features.7", criterion="loss_change")
    assert float(actual[2]) == pytest.approx(float(expected.detach()), abs=1e-12)


@pytest.mark.parametrize("make", [MobileNet, ResNeXt, ExciteNet, OptionANet, DenseNet])
def test_loss_change_is_that_of_a_real_removal_for_every_kind_of_group(make, one_export):
    model, (x, y) = randomised(make()).double(), images()
    x = x.double()
    groups = [g for g in find_groups(trace(model, x)) if g.frozen is None]
    assert len(groups) >= 3
    for group in groups:
        expected = []
        for neuron in range(group.size):
            plan = Plan()
            plan.add(group, [neuron])
            smaller = plan.apply(copy.deepcopy(model))
            expected.append(F.cross_entropy(smaller(x), y) - F.cross_entropy(model(x), y))
        actual = singe.score(model, (x, y), group.name, criterion="loss_change")
        assert error(actual, torch.stack(expected).detach()) < 1e-9, group.name


class Depthwise(nn.Module):
    """Two depthwise channels for each of four, shifted by a bias of their own or by a batch norm."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=not norm)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.depthwise(F.relu(self.first(x))))).mean((2, 3)))

    def folded(self):
        """Weight and bias of the depthwise convolution with the batch norm in it."""
        if isinstance(self.norm, nn.Identity):
            return self.depthwise.weight, self.depthwise.bias
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return self.depthwise.weight * scale[:, None, None, None], self.norm.bias - scale * self.norm.running_mean


def integral_with_depthwise(model, x, y, fading):
    """Two nodes of the integrated gradient of ``first``; ``fading``: what of its depthwise rows fades with it."""
    weight, bias, (deep, shift) = model.first.weight.detach(), model.first.bias.detach(), model.folded()
    deep, shift, total = deep.detach(), shift.detach(), torch.zeros(4, dtype=torch.float64)
    for n in range(4):
        for t, node_weight in zip(*(v.tolist() for v in TWO.dt()), strict=True):
            one = torch.ones(4, dtype=torch.float64)
            one[n] = t
            two, still = one.repeat_interleave(2), torch.ones(8, dtype=torch.float64)
            a = (weight * one[:, None, None, None]).requires_grad_()
            b = (deep * (two if "weight" in fading else still)[:, None, None, None]).requires_grad_()
            c = shift * (two if "shift" in fading else still)
            z = F.conv2d(F.relu(F.conv2d(x, a, bias * one)), b, c, padding=1, groups=4)
            da, db = torch.autograd.grad(F.cross_entropy(model.head(F.relu(z).mean((2, 3))), y), (a, b))
            total[n] += node_weight * weight[n].norm() * da[n].norm()
            total[n] += sum(node_weight * deep[row].norm() * db[row].norm() for row in (2 * n, 2 * n + 1))
    return total


@pytest.mark.parametrize("norm", [False, True], ids=["bias", "batch norm"])
def test_what_a_depthwise_convolution_adds_to_a_neuron_fades_with_it(norm, one_export):
    model, (x, y) = randomised(Depthwise(norm)).double(), images()
    x = x.double()
    careful = integral_with_depthwise(model, x, y, {"weight", "shift"})
    for forgetful in ({"weight"}, set()):
        careless = integral_with_depthwise(model, x, y, forgetful)
        assert (careful - careless).abs().max() > 1e-3 * careful.max()
    for layer in ("first", "depthwise"):
        actual = singe.score(model, (x, y), layer, criterion=singe.IntegratedGradient(quadrature=TWO))
        assert error(actual, careful) < 1e-9


def test_the_result_is_one_float64_per_neuron_on_the_cpu_without_history():
    scores = singe.score(randomised(MLP()), vectors(), "layers.0")
    assert scores.shape == (12,) and scores.dtype == torch.float64 and scores.device.type == "cpu"
    assert not scores.requires_grad and (scores > 0).all()


# -- losses and outputs ------------------------------------------------------------------------------------------


def total(outputs, batch):
    logits, extra = outputs.values() if isinstance(outputs, dict) else outputs
    scale, penalty = (extra, 0) if isinstance(extra, float) else (1, extra.square().mean())
    return F.cross_entropy(logits / scale, batch[1]) + penalty


@pytest.mark.parametrize("extra", ["head", "scalar", "number", "activation"])
def test_a_loss_of_several_outputs_equals_the_reference(extra, one_export):
    model, batch = randomised(TwoOutputs(extra)).double(), vectors()
    batch = batch[0].double(), batch[1]
    for layer in ("first", "middle"):  # before and behind where the outputs part
        for criterion in ("integrated_gradient", "loss_change"):
            expected = reference.score(model, batch, layer, criterion=criterion, loss=total)
            actual = singe.score(model, batch, layer, criterion=criterion, loss=total)
            assert error(actual, expected) < 1e-9, (layer, criterion)


def test_any_scalar_loss_equals_the_reference(one_export):
    model, batch = randomised(MLP()), vectors()
    for loss in (
        lambda o, b: F.cross_entropy(o, b[1], reduction="sum"),
        lambda o, b: F.mse_loss(o, b[0][:, :4]).reshape(1),
        lambda o, b: F.cross_entropy(o, torch.softmax(b[0][:, 4:8], 1), label_smoothing=0.1),
    ):
        expected = reference.score(model, batch, "layers.0", loss=loss)
        assert error(singe.score(model, batch, "layers.0", loss=loss), expected) < 1e-5


def test_the_default_loss_is_the_mean_cross_entropy():
    model, batch = randomised(MLP()), vectors()
    explicit = singe.score(model, batch, "layers.2", loss=lambda o, b: F.cross_entropy(o, b[1]))
    assert torch.equal(singe.score(model, batch, "layers.2"), explicit)
    with pytest.raises(TypeError, match=r"dict.*loss="):
        singe.score(randomised(TwoOutputs("head")), batch, "first")


@pytest.mark.parametrize(
    ("loss", "kind", "match"),
    [
        (lambda o, b: 1.0, TypeError, "float"),
        (lambda o, b: F.cross_entropy(o, b[1], reduction="none"), ValueError, r"scalar.*\(5,\)"),
        (lambda o, b: o.sum() * math.nan, ValueError, "finite loss"),
        (lambda o, b: (o.argmax(1) == b[1]).float().mean(), ValueError, "differentiable|gradient"),
    ],
    ids=["no tensor", "no scalar", "not finite", "not differentiable"],
)
def test_a_loss_that_gives_no_usable_scalar_is_refused(loss, kind, match):
    with pytest.raises(kind, match=match):
        singe.score(randomised(MLP()), vectors(), "layers.0", loss=loss)


# -- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "batch statistics", "neighbour", "attention"])
def test_samples_that_see_each_other_are_not_stacked(how, one_export):
    torch.manual_seed(0)
    model, batch = Centred(how).double().eval(), vectors()
    batch = batch[0].double(), batch[1]
    for criterion in (singe.IntegratedGradient(), singe.IntegratedGradient(path="layer"), singe.LossChange()):
        expected = reference.score(model, batch, "first", criterion=criterion)
        assert error(singe.score(model, batch, "first", criterion=criterion), expected) < 1e-9, criterion


@pytest.mark.parametrize("make", [FixedBatch, CountedBatch])
def test_a_model_that_fixes_its_batch_size_equals_the_reference(make, one_export):
    model, batch = randomised(make()), vectors()
    for criterion in (singe.IntegratedGradient(), singe.IntegratedGradient(path="layer")):
        expected = reference.score(model, batch, "layers.0", criterion=criterion)
        assert error(singe.score(model, batch, "layers.0", criterion=criterion), expected) < 1e-5


@pytest.mark.parametrize("time", [7, 5])
def test_a_batch_on_the_second_axis_equals_the_reference(time, one_export):
    model, batch = randomised(SequenceFirst()), vectors(5, time)
    assert error(singe.score(model, batch, "first"), reference.score(model, batch, "first")) < 1e-5


def test_a_batch_norm_over_another_axis_is_not_taken_for_the_layers_own(one_export):
    model, batch = randomised(NormOverTime()), vectors(5, 7)
    assert error(singe.score(model, batch, "first"), reference.score(model, batch, "first")) < 1e-5


class SharedNorm(nn.Module):
    """One batch norm behind three layers; two of them are one neuron."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.c, self.head = nn.Conv2d(5, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        y = self.norm(self.a(x)).relu() + self.norm(self.b(x)).tanh()
        return self.head(self.norm(self.c(y)).relu().mean((2, 3)))


@pytest.mark.parametrize("criterion", ["integrated_gradient", "loss_change", "magnitude"])
def test_a_batch_norm_at_several_places_equals_the_reference(criterion, one_export):
    model, (x, y) = randomised(SharedNorm()).double(), images()
    batch = x.double(), y
    expected = reference.score(model, batch, "a", criterion=criterion)
    assert error(singe.score(model, batch, "a", criterion=criterion), expected) < 1e-9
    if criterion == "loss_change":
        assert_folding_changes_nothing(model, batch[0])


def assert_folding_changes_nothing(model, x):
    folded = copy.deepcopy(model)
    reference.fold(folded, trace(folded, x))
    assert torch.allclose(folded(x), model(x), atol=1e-12)


class Unrolled(nn.Module):
    """A convolution used again behind itself, with a batch norm for each use, or for the second alone."""

    def __init__(self, norms=2, residual=False):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, padding=1), nn.Linear(5, 4)
        self.norms = nn.ModuleList([nn.BatchNorm2d(5) for _ in range(norms)])
        self.residual = residual

    def forward(self, x):
        x = self.stem(x).relu()
        for i in range(2):
            y = self.conv(x)
            at = i + len(self.norms) - 2
            y = self.norms[at](y) if at >= 0 else y
            x = (x + y if self.residual else y).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("make", [Unrolled, lambda: Unrolled(residual=True), lambda: Unrolled(norms=1)])
def test_a_layer_behind_itself_with_other_batch_norms_equals_the_reference(make, one_export):
    model, (x, y) = randomised(make()).double(), images()
    x = x.double()
    for criterion in ("loss_change", "gradient", singe.IntegratedGradient(), singe.SummedGradient(path="layer")):
        expected = reference.score(model, (x, y), "conv", criterion=criterion)
        torch.testing.assert_close(singe.score(model, (x, y), "conv", criterion=criterion), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_batches_equal_the_reference(count):
    model, batch = randomised(PlainNet()), images(count)
    assert error(singe.score(model, batch, "features.4"), reference.score(model, batch, "features.4")) < 1e-5


def test_memory_changes_nothing_but_rounding(one_export):
    model, batch = randomised(DigitNet(3)), images(channels=1)
    for criterion in (singe.IntegratedGradient(), singe.IntegratedGradient(path="layer"), singe.LossChange()):
        tiny, some, huge = (
            singe.score(model, batch, "stem", criterion=criterion, memory=m) for m in (1, 300_000, 1 << 40)
        )
        assert error(tiny, huge) < 1e-5
        assert error(some, huge) < 1e-5


def test_channels_last_changes_nothing_but_rounding():
    model, (x, y) = randomised(DigitNet(3)), images(channels=1)
    expected = singe.score(model, (x, y), "blocks.1.conv1")
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert error(singe.score(model, (x, y), "blocks.1.conv1"), expected) < 1e-5


def test_a_model_that_works_in_place_on_its_input_sees_the_same_batch_every_time():
    model, (x, y) = randomised(InPlaceOnInput()), vectors()
    plain = MLP().eval()
    plain.load_state_dict(model.state_dict())
    expected, before = singe.score(plain, (x - 0.5, y), "layers.0"), x.clone()
    assert error(singe.score(model, (x, y), "layers.0"), expected) < 1e-5
    assert torch.equal(x, before)
