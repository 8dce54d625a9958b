"""Networks that are not model(x), on batches that are not (x, y)."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from networks import MLP, PlainNet, images, randomised
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from wiring import Wired, normal

import singe
from singe import reference
from singe.removal.trial import expanded
from singe.task import cross_entropy

QUICK = {"images": 10, "progress": False, "finetune": None}


class Captioned(nn.Module):
    """An image and a vector, by keyword only; a dict of logits and their mean."""

    def __init__(self):
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 6, 3), nn.Linear(5, 6)
        self.middle, self.head = nn.Linear(6, 7), nn.Linear(7, 4)

    def forward(self, *, image, vector):
        y = F.relu(self.conv(image)).mean((2, 3)) + self.side(vector)
        logits = self.head(F.relu(self.middle(F.relu(y))))
        return {"logits": logits, "means": [logits.mean(1)]}


def captioned(count=10, seed=0, keys=("image", "vector", "label")):
    x, y = images(count, 6, seed=seed)
    batch = {"image": x, "vector": normal(count, 5, seed=seed), "label": y}
    return {key: batch[key] for key in keys}


def by_keyword(model, batch):
    return model(image=batch["image"], vector=batch["vector"])


def judged(outputs, batch):
    return F.cross_entropy(outputs["logits"], batch["label"]) + outputs["means"][0].square().mean()


class Attentive(nn.Module):
    """The mean of the tokens that a mask leaves."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, tokens, mask):
        y = F.gelu(self.second(F.gelu(self.first(tokens)))) * mask[:, :, None]
        return self.head(y.sum(1) / mask.sum(1, keepdim=True))


def masked_tokens(count=10, seed=0, time=7):
    mask = (normal(count, time, seed=seed + 1) > 0).float()
    mask[:, 0] = 1
    y = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))
    return (normal(count, time, 5, seed=seed), mask), y


class Scaled(MLP):
    """Works in place on both of its inputs."""

    def forward(self, x, scale):
        scale.clamp_(0.5, 1)
        return self.layers(x.mul_(scale))


def scaled(count=10, seed=0):
    y = torch.randint(4, (count,), generator=torch.Generator().manual_seed(seed))
    return [normal(count, 10, seed=seed), normal(count, 10, seed=seed + 1), y]


def inner(model, batch):
    return model(*batch[0])


def outer(model, batch):
    return model(batch[0], batch[1])


def last(outputs, batch):
    return F.cross_entropy(outputs, batch[-1])


factor = torch.tensor([1.0, -1.0, 2.0, 0.5, 3.0])
teachers = {dtype: randomised(nn.Linear(5, 5), seed=7).to(dtype) for dtype in (torch.float32, torch.float64)}


def closing_over_a_tensor(model, batch):
    return model(image=batch["image"], vector=batch["vector"] * factor)


def closing_over_a_network(model, batch):
    vector = batch["vector"]
    return model(image=batch["image"], vector=teachers[vector.dtype](vector))


TASKS = {
    "keywords and dicts": (Captioned, captioned, by_keyword, judged, ["conv", "middle"]),
    "nested with a mask": (Attentive, masked_tokens, inner, last, ["first", "second"]),
    "list, in place": (Scaled, scaled, outer, last, ["layers.0", "layers.2"]),
    "closing over a tensor": (Captioned, captioned, closing_over_a_tensor, judged, ["conv"]),
    "closing over a network": (Captioned, captioned, closing_over_a_network, judged, ["conv"]),
}
EVERY_TASK = pytest.mark.parametrize(("make", "data", "forward", "loss", "layers"), TASKS.values(), ids=TASKS.keys())


def as_double(batch):
    return pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, batch)


@EVERY_TASK
def test_scores_equal_the_reference(make, data, forward, loss, layers, one_export):
    model, batch = randomised(make()).double(), as_double(data())
    for layer in layers:
        for criterion in (singe.IntegratedGradient(quadrature=singe.GaussLegendre(2)), singe.LossChange()):
            options = {"criterion": criterion, "forward": forward, "loss": loss}
            expected = reference.score(model, batch, layer, **options)
            actual = singe.score(model, batch, layer, **options)
            assert (actual - expected).norm() <= 1e-9 * expected.norm() != 0, (layer, criterion)


@EVERY_TASK
@pytest.mark.parametrize("finetune", [None, singe.FineTune(steps=4)], ids=["", "tuned"])
def test_a_pruned_network_is_the_masked_one_and_the_batches_are_as_before(make, data, forward, loss, layers, finetune):
    model = randomised(make())
    loader = [data(count, seed) for count, seed in ((4, 0), (8, 1), (6, 2))]
    before = [t.clone() for t in pytree.tree_leaves(loader)]
    result = singe.prune(
        model, loader, 0.3, forward=forward, loss=loss, images=10, progress=False, finetune=finetune
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(loader), before, strict=True))
    assert 0.2 < result.params_removed < 0.4
    full = expanded(model, result.model, result.plan)
    with torch.no_grad():
        pair = [pytree.tree_leaves(forward(network.eval(), data())) for network in (result.model, full)]
    for actual, expected in zip(*pair, strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()
    assert (result.loss_after != result.loss_before) and result.macs_after < result.macs_before


def test_forward_may_be_left_out_where_it_is_the_plain_one():
    model, batch = randomised(PlainNet()), images()
    expected = singe.score(model, batch, "features.4")
    assert torch.equal(singe.score(model, batch, "features.4", forward=lambda model, b: model(b[0])), expected)
    plain, explicit = (
        singe.prune(model, [images(10)], 0.3, forward=forward, **QUICK)
        for forward in (None, lambda model, batch: model(batch[0]))
    )
    assert plain.plan == explicit.plan and plain.loss_after == explicit.loss_after


def test_what_forward_leaves_aside_is_not_fed_to_the_network_but_reaches_the_loss():
    model, batch = randomised(MLP()), (normal(10, 10), normal(10, 3, 3), normal(10, 4))
    seen = []

    def loss(outputs, batch):
        seen.append([tuple(t.shape) for t in batch])
        return F.mse_loss(outputs, batch[2])

    scores = singe.score(model, batch, "layers.0", forward=lambda m, b: m(b[0]), loss=loss)
    assert (scores > 0).all()
    assert {tuple(shapes) for shapes in seen} == {((10, 10), (10, 3, 3), (10, 4))}


def test_forward_may_rewrite_its_batch():
    def careless(model, batch):
        batch["image"] = batch["image"].mul_(2)
        del batch["label"]
        return by_keyword(model, batch)

    def careful(model, batch):
        return model(image=batch["image"] * 2, vector=batch["vector"])

    model, batch = randomised(Captioned()), captioned()
    a, b = (singe.score(model, batch, "conv", forward=forward, loss=judged) for forward in (careless, careful))
    assert torch.equal(a, b)
    assert set(batch) == {"image", "vector", "label"}
    tuned = singe.FineTune(steps=3)
    result = singe.prune(model, [batch], 0.3, forward=careless, loss=judged, **QUICK | {"finetune": tuned})
    assert result.params_removed > 0.2


def test_a_loss_that_python_takes_for_false_is_a_loss():
    class Empty(nn.ModuleList):
        def forward(self, outputs, batch):
            return outputs.square().mean()

    model, batch = randomised(MLP()), (normal(10, 10), torch.arange(10) % 4)
    for score in (singe.score, singe.reference.score):
        expected = score(model, batch, "layers.0", loss=lambda outputs, batch: outputs.square().mean())
        assert torch.equal(score(model, batch, "layers.0", loss=Empty()), expected)
        with pytest.raises(TypeError, match="expected loss to be a function, got int"):
            score(model, batch, "layers.0", loss=0)


def test_a_pair_with_names_is_a_pair():
    Pair = namedtuple("Pair", "x y")
    model, (x, y) = randomised(MLP()), (normal(10, 10), torch.arange(10) % 4)
    expected = singe.score(model, (x, y), "layers.0")
    assert torch.equal(singe.score(model, Pair(x, y), "layers.0"), expected)
    named = singe.score(
        model, Pair(x, y), "layers.0", forward=lambda m, b: m(b.x), loss=lambda o, b: cross_entropy(o, tuple(b))
    )
    assert torch.equal(named, expected)


# -- as in Hugging Face's transformers ----------------------------------------------------------------------------


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """A dict and a dataclass in one, in which None does not count as an item."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self):
        self.update({f.name: v for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None})


class BatchEncoding(UserDict):
    """What tokenizers and collators return: no dict, but a mapping."""


class TextClassifier(nn.Module):
    """Embeddings, attention under a mask, a gated MLP; computes its own loss where it gets labels."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(7, 8)
        self.num_attention_heads, self.attention_head_size = 2, 4
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 14), nn.Linear(14, 8)
        self.pooler, self.classifier = nn.Linear(8, 9), nn.Linear(9, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.words(input_ids) + self.places.weight[: input_ids.shape[1]]
        heads = (*x.shape[:-1], -1, self.attention_head_size)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.norm(x + self.out(mixed))
        x = x + self.down(F.gelu(self.up(x)))
        logits = self.classifier(torch.tanh(self.pooler(x[:, 0])))
        return ModelOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def encoded(count=10, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(20, (count, 7), generator=draw), torch.ones(count, 7, dtype=torch.int64)
    mask[::2, 5:] = 0
    labels = torch.randint(4, (count,), generator=draw)
    return BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": labels})


def with_labels(model, batch):
    return model(**batch)


def own_loss(outputs, batch):
    return outputs.loss


def without_labels(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def of_logits(outputs, batch):
    return F.cross_entropy(outputs.logits, batch["labels"])


WAYS = {"its own loss": (with_labels, own_loss), "a loss outside": (without_labels, of_logits)}
EITHER_WAY = pytest.mark.parametrize(("forward", "loss"), WAYS.values(), ids=WAYS.keys())


@EITHER_WAY
def test_scores_of_a_model_that_answers_in_a_dataclass_equal_the_reference(forward, loss, one_export):
    model, batch = randomised(TextClassifier()).double(), dict(encoded())
    for layer in ("up", "pooler"):
        options = {"criterion": singe.LossChange(), "forward": forward, "loss": loss}
        expected = reference.score(model, batch, layer, **options)
        actual = singe.score(model, batch, layer, **options)
        assert (actual - expected).norm() <= 1e-9 * expected.norm() != 0, layer


@EITHER_WAY
def test_such_a_model_is_pruned_and_tuned_on_batches_in_mappings(forward, loss):
    model, loader = randomised(TextClassifier()), [encoded(seed=seed) for seed in range(3)]
    result = singe.prune(
        model, loader, 0.2, forward=forward, loss=loss, images=10, progress=False, finetune=singe.FineTune(steps=3),
        allocation="uniform",
    )  # fmt: skip
    assert 0.15 < result.params_removed < 0.25
    assert result.model.value.out_features == result.model.out.in_features == 4  # of two heads one is left
    assert type(result.model(**encoded())) is ModelOutput
    assert torch.equal(loader[0]["labels"], encoded(seed=0)["labels"])


@EITHER_WAY
def test_single_weights_of_such_a_model_go_too(forward, loss):
    model, loader = randomised(TextClassifier()), [encoded(20)]
    result = singe.prune(model, loader, 0.3, structured=False, forward=forward, loss=loss, **QUICK)
    assert result.weights_removed == pytest.approx(0.3, abs=0.01)


def test_a_model_that_computes_its_loss_is_pruned_as_with_a_loss_outside():
    model, loader = randomised(TextClassifier()).double(), [encoded(20)]
    one, other = (
        singe.prune(model, loader, 0.2, forward=forward, loss=loss, **QUICK) for forward, loss in WAYS.values()
    )
    assert one.plan == other.plan and one.loss_after == pytest.approx(other.loss_after)


def test_outputs_in_a_class_of_its_own_are_named_and_forward_can_open_them():
    class Opaque:
        def __init__(self, logits):
            self.logits = logits

    model, batch = Wired(lambda self, x: Opaque(self.b(F.relu(self.a(x)))), a=nn.Linear(5, 6), b=nn.Linear(6, 4)), (
        normal(10, 5), torch.arange(10) % 4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"returns a Opaque.*no list, tuple, dict or dataclass.*forward="):
        singe.score(model, batch, "a", loss=lambda o, b: F.cross_entropy(o.logits, b[1]))
    assert (singe.score(model, batch, "a", forward=lambda m, b: m(b[0]).logits) > 0).all()


# -- losses that work in place -----------------------------------------------------------------------------------


def test_a_loss_may_work_in_place_and_take_the_batch_apart():
    def loss(outputs, batch):
        return F.cross_entropy(outputs["logits"].div_(2), batch.pop("label"))

    def plain(outputs, batch):
        return F.cross_entropy(outputs["logits"] / 2, batch["label"])

    model, batch = randomised(Captioned()), captioned()
    scores = [singe.score(model, batch, "conv", forward=by_keyword, loss=of) for of in (loss, plain)]
    torch.testing.assert_close(*scores)
    assert "label" in batch


# -- batches that differ ------------------------------------------------------------------------------------------


class Difference(nn.Module):
    """Two inputs of one shape that must not be taken for one another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, left, right):
        return self.head(F.relu(self.a(left)) - F.silu(self.b(right)))


@pytest.mark.parametrize("turned", [0, 1, 2])
def test_dicts_may_name_their_tensors_in_any_order(turned):
    def batch(seed, turn):
        tensors = {"left": normal(10, 5, seed=seed), "right": normal(10, 5, seed=seed + 50), "y": torch.arange(10) % 4}
        return dict(reversed(tensors.items())) if turn else tensors

    model, options = randomised(Difference()), {**QUICK, "images": 20, "criterion": "integrated_gradient"}
    options |= {"forward": lambda m, b: m(b["left"], b["right"]), "loss": lambda o, b: F.cross_entropy(o, b["y"])}
    one, other = (
        singe.prune(model, [batch(seed, turn and seed == turned) for seed in range(3)], 0.3, **options)
        for turn in (False, True)
    )
    assert one.plan == other.plan
    assert one.history[0].scores == pytest.approx(other.history[0].scores, rel=1e-4)


DIFFERING = {
    "keys": ([captioned(5), captioned(5, keys=("image", "vector"))], r"one shape.*label.*and"),
    "shapes": ([captioned(5), captioned(5) | {"vector": normal(5, 6)}], r"\(5,\).*\(6,\)"),
    "kinds": ([captioned(5), list(captioned(5).values())], "one shape"),
}


@pytest.mark.parametrize(("loader", "message"), DIFFERING.values(), ids=DIFFERING.keys())
def test_batches_whose_structures_differ_cannot_be_joined_and_are_shown(loader, message):
    with pytest.raises(ValueError, match=message):
        singe.prune(randomised(Captioned()), loader, 0.3, forward=by_keyword, loss=judged, **QUICK)


NO_BATCHES = {
    "number": (captioned() | {"weight": 2.0}, TypeError, r"lists, tuples and dicts, got float at \['weight'\]"),
    "none": (captioned() | {"mask": None}, TypeError, r"got NoneType at \['mask'\]"),
    "strings": ((normal(10, 5), ["name"] * 10), TypeError, r"got str at \[1\]\[0\]"),
    "empty": ({}, TypeError, "got dict"),
    "scalar": (captioned() | {"weight": torch.tensor(2.0)}, ValueError, r"one length.*weight: \(\) torch.float32"),
    "lengths": (captioned() | {"label": torch.arange(9)}, ValueError, r"one length.*\(10, 5\).*\(9,\)"),
    "no samples": (captioned(0), ValueError, "at least 1"),
}


@pytest.mark.parametrize(("batch", "kind", "message"), NO_BATCHES.values(), ids=NO_BATCHES.keys())
def test_what_is_no_batch_of_tensors_is_refused(batch, kind, message):
    model, options = randomised(Captioned()), {"forward": by_keyword, "loss": judged}
    with pytest.raises(kind, match=message):
        singe.score(model, batch, "conv", **options)
    with pytest.raises(kind, match=message):
        singe.prune(model, [batch], 0.3, **options, **QUICK)


def test_a_batch_that_is_no_pair_needs_a_forward():
    with pytest.raises(TypeError, match=r"batch \(x, y\), got dict.*forward= and loss="):
        singe.score(randomised(Captioned()), captioned(), "conv")


@pytest.mark.parametrize(
    "batch",
    [{"x": normal(10, 10), "y": torch.arange(10) % 4}, (normal(10, 10), normal(10, 4).sigmoid(), torch.arange(10))],
    ids=["dict", "three"],
)
def test_the_default_loss_is_refused_for_batches_that_are_no_pairs(batch):
    def forward(model, batch):
        return model(batch["x"] if isinstance(batch, dict) else batch[0])

    with pytest.raises((TypeError, ValueError), match="loss="):
        singe.score(randomised(MLP()), batch, "layers.0", forward=forward)


def test_outputs_that_are_no_logits_need_a_loss():
    with pytest.raises(TypeError, match=r"tensor of logits.*got dict.*loss="):
        singe.score(randomised(Captioned()), captioned(), "conv", forward=by_keyword)


def test_a_forward_that_fails_is_reported_with_the_batch_and_its_own_words():
    with pytest.raises(
        ValueError, match=r"forward\(model, batch\) failed.*image: \(10, 3, 6, 6\).*positional argument"
    ):
        singe.score(randomised(Captioned()), captioned(), "conv", forward=lambda m, b: m(b["image"]), loss=judged)


def test_a_forward_that_runs_another_network_finds_nothing_to_prune():
    model, another = randomised(Captioned()), randomised(Captioned())
    with pytest.raises(ValueError, match="neurons to prune"):
        singe.prune(
            model, [captioned()], 0.3, forward=lambda _, b: by_keyword(another, b), loss=judged, **QUICK
        )  # fmt: skip
