import sys
from functools import partial

import pytest
import torch

import singe
from singe import FineTune, demo


def test_the_digits_are_standardised_split_without_overlap_and_always_the_same(digit_data):
    (x, y), (test_x, test_y) = (part.tensors for part in digit_data)
    assert x.shape == (1437, 1, 8, 8) and test_x.shape == (360, 1, 8, 8)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    every = torch.cat([x, test_x])
    assert abs(float(every.mean())) < 1e-5 and float(every.std()) == pytest.approx(1, abs=1e-4)
    assert set(y.tolist()) == set(test_y.tolist()) == set(range(10))
    assert len(every.flatten(1).unique(dim=0)) == len(every)  # no digit twice, so none in both parts
    assert torch.equal(demo.digits()[1].tensors[0], test_x)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"singe\[demo\]"):
        demo.digits()


def test_the_network_learns(trained, digit_data):
    assert singe.accuracy(trained, [digit_data[1].tensors]) > 0.95
    assert singe.accuracy(demo.DigitNet(), [digit_data[1].tensors]) < 0.5


def test_the_demo_prunes_by_what_it_says_and_gets_its_network_back(capsys, monkeypatch):
    said, net = [], demo.DigitNet
    # the same demo, narrower and shorter
    monkeypatch.setattr(demo, "DigitNet", lambda: net(6))
    monkeypatch.setattr(demo, "prune", partial(demo.prune, finetune=FineTune(steps=100), progress=False))
    with torch.random.fork_rng():
        demo.run(said.append, rhos=(0.5,), epochs=4)
    text = "\n".join(said)
    assert capsys.readouterr().out == ""
    assert "Removed 50." in text or "Removed 49." in text
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert {"network", "unpruned", "rho = 0.5"} <= rows.keys()
    before, after = (int(word.replace(",", "")) for word in (rows["unpruned"][2], rows["rho = 0.5"][4]))
    assert 0.49 < 1 - after / before < 0.51
    assert float(rows["rho = 0.5"][3].rstrip("%")) > 80
    assert "the same answers" in said[-1]
