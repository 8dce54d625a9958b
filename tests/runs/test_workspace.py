import logging

import pytest
import torch
from networks import DigitNet, PlainNet, images, randomised
from torch.utils.data import DataLoader, TensorDataset

import singe

COMPENSATE, RECALIBRATE = "compensate='least_squares'", "re-estimate batch norms with recalibrate_bn="


@pytest.mark.parametrize(
    ("options", "named", "left_out"),
    [
        ({"compensate": "none"}, ["fine-tune,", COMPENSATE, RECALIBRATE], ["fine-tune longer"]),
        ({"finetune": singe.FineTune(1)}, ["fine-tune longer", RECALIBRATE], [COMPENSATE]),
        ({"recalibrate_bn": 8}, ["fine-tune,"], [COMPENSATE, RECALIBRATE]),
        ({"structured": False}, ["fine-tune,", RECALIBRATE], [COMPENSATE]),
    ],
)
def test_a_collapse_names_what_has_not_been_tried(options, named, left_out, caplog):
    x, y = images(48)
    loader = DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True)
    arguments = {"criterion": "magnitude", "finetune": None, "images": 24, "progress": False}
    if options.get("structured", True):
        arguments |= {"compensation_images": 24, "allocation": "uniform"}
    with caplog.at_level(logging.WARNING, "singe"):
        singe.prune(randomised(PlainNet()), loader, 0.3, loss=grown(), **arguments | options)
    (said,) = [r.getMessage() for r in caplog.records if "collapsed" in r.getMessage()]
    assert all(words in said for words in named), said
    assert not any(words in said for words in left_out), said


def grown():
    """A loss that is small for the outputs it sees first, and large for all others."""
    first = []

    def loss(outputs, batch):
        first.append(outputs.detach().clone())
        return 1 + 100 * (outputs - first[0]).square().mean()

    return loss


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "loss_change", "compensation_images": 96},
        {"criterion": "magnitude", "allocation": "uniform", "compensate": "none"},
        {"structured": False},
    ],
)
def test_no_pass_takes_more_samples_than_there_is_memory_for(options):
    loader = DataLoader(TensorDataset(*images(96, channels=1)), batch_size=8, shuffle=True)
    found = []
    for memory in (1 << 30, 1 << 17):
        model, seen = randomised(DigitNet(4)), []
        model.stem.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].shape[0]))
        result = singe.prune(model, loader, 0.2, images=96, finetune=None, memory=memory, progress=False, **options)
        found.append((max(n for n in seen if isinstance(n, int)), result.loss_before, result.loss_after))
    (many, *expected), (few, *losses) = found
    assert many == 96 and few <= 16
    assert losses == pytest.approx(expected, rel=5e-3)


class Counting(PlainNet):
    """Counts its samples, also in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.tensor(7))

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


@pytest.mark.parametrize("options", [{"allocation": "uniform", "compensate": "none"}, {"structured": False}])
def test_buffers_that_count_passes_come_back_as_they_were_unless_training_has_moved_them(options, caplog):
    loader = DataLoader(TensorDataset(*images(24)), batch_size=8, shuffle=True)
    for steps in (0, 2):
        tuned = singe.FineTune(steps) if steps else None
        model = randomised(Counting())
        arguments = {"criterion": "magnitude", "finetune": tuned, "images": 8, "progress": False}
        result = singe.prune(model, loader, 0.3, **arguments | options)
        assert model.seen == 7
        assert (result.model.seen > 7) == bool(steps)
        assert ("seen change in eval mode, too" in caplog.text) == bool(steps)


class Remembering(PlainNet):
    """Makes a buffer when it is called first, and has one with an entry for every channel."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)
        self.register_buffer("acts", torch.zeros(7))

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.ones(())
        y = self.features[0](x)
        self.acts += y.detach().mean((0, 2, 3))
        return self.classifier(self.features[1:](y).flatten(1)) * self.scale


def test_buffers_of_any_kind_do_not_end_a_run():
    loader = DataLoader(TensorDataset(*images(24)), batch_size=8, shuffle=True)
    options = {"allocation": "uniform", "compensate": "none", "criterion": "magnitude", "finetune": None, "images": 8}
    result = singe.prune(randomised(Remembering()), loader, 0.3, progress=False, **options)
    assert 0 < len(result.model.features[0].weight) < 7
