"""The whole way, on every device there is."""

import pytest
import torch
from networks import DigitNet, MobileNet, PlainNet, PreActNet, ResNeXt, images, randomised
from torch.nn import functional as F

import singe

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
CRITERIA = [singe.IntegratedGradient(), singe.IntegratedGradient(path="layer"), singe.LossChange(), singe.Magnitude(1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (PlainNet, "features.4"), (PreActNet, "stem"), (PlainNet, "classifier.0"), (MobileNet, "down.0"),
        (ResNeXt, "conv2"),
    ],
    ids=str,
)  # fmt: skip
def test_scores_equal_the_reference(device, make, layer, one_export):
    model = randomised(make()).double().to(device)
    x, y = images()
    batch = x.double().to(device), y.to(device)
    for criterion in CRITERIA:
        scores = singe.score(model, batch, layer, criterion=criterion)
        expected = singe.reference.score(model, batch, layer, criterion=criterion)
        assert scores.device.type == expected.device.type == "cpu"
        assert (scores - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_a_pruned_network_stays_on_its_device_and_trains(device, tmp_path):
    model = randomised(DigitNet(4)).to(device)
    loader = [images(16, channels=1, classes=10, seed=s) for s in range(3)]  # on the CPU
    result = singe.prune(model, loader, 0.4, finetune=singe.FineTune(steps=6), images=16, progress=False)
    assert {t.device.type for t in result.model.state_dict().values()} == {device}
    x, y = (t.to(device) for t in loader[0])
    F.cross_entropy(result.model.train()(x), y).backward()
    result.save(tmp_path)
    again = singe.load(model, tmp_path).eval()
    assert torch.equal(again(x), result.model.eval()(x))


@pytest.mark.parametrize("device", DEVICES)
def test_a_folded_network_stays_on_its_device(device):
    model, x = randomised(PreActNet()).double().to(device), images()[0].double().to(device)
    folding = singe.fold_batchnorm(model, x)
    assert folding.folded == ("bn1", "bn2")  # into stem and conv2, of which bn3 undoes one, and into conv1
    assert {t.device.type for t in folding.model.state_dict().values()} == {device}
    torch.testing.assert_close(folding.model(x), model(x))
