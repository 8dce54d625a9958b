import sys

import pytest
import torch
from networks import DenseNet, DigitNet, MobileNet, PlainNet, ResNeXt, images, randomised
from torch import nn
from wiring import Wired, normal

import singe

tp = pytest.importorskip("torch_pruning")

QUICK = singe.IntegratedGradient(quadrature=singe.GaussLegendre(2))


def grouped(model, x):
    """The names of the roots of Torch-Pruning's groups, and these."""
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, x[:1])
    return {names[group[0].dep.target.module]: group for group in graph.get_all_groups()}


def digit_net():
    return randomised(DigitNet(4)), images(8, channels=1, classes=10)


NETWORKS = {
    "residual": digit_net,
    "depthwise": lambda: (randomised(MobileNet()), images(8)),
    "concatenated": lambda: (randomised(DenseNet()), images(8)),
    "flattened": lambda: (randomised(PlainNet()), images(8)),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS.keys())
def test_scores_of_a_group_are_those_of_its_root(make, one_export):
    model, batch = make()
    importance = singe.SingeImportance(model, batch, criterion=QUICK)
    groups = grouped(model, batch[0])
    assert len(groups) > 1
    for root, group in groups.items():
        scores = importance(group)
        if len(scores) == len(expected := singe.score(model, batch, root, criterion=QUICK)):
            assert torch.equal(scores, expected), root
        else:  # several channels of the root are one neuron: all of them have its score
            assert torch.equal(scores.unique(), expected.unique()), root


def test_channels_of_one_neuron_share_its_score():
    model, batch = randomised(ResNeXt()), images(8)
    scores = singe.SingeImportance(model, batch, criterion=QUICK)(grouped(model, batch[0])["conv2"])
    expected = singe.score(model, batch, "conv2", criterion=QUICK)
    assert torch.equal(scores.view(3, 2), expected.expand(3, 2))


def pruned_by(model, importance, x, **options):
    pruner = tp.pruner.MagnitudePruner(
        model, x[:1], importance=importance, ignored_layers=[model.head], round_to=1, **options
    )
    for _ in range(options.get("iterative_steps", 1)):
        pruner.step()
    return pruner.pruning_history()


@pytest.mark.parametrize("ranked", [False, True], ids=["by layer", "over all layers"])
def test_a_pruner_removes_the_least_relevant_channels(ranked, one_export):
    model, (x, y) = digit_net()
    expected = {root: singe.score(model, (x, y), root, criterion=QUICK) for root in grouped(model, x) if root != "head"}
    history = pruned_by(
        model, singe.SingeImportance(model, (x, y), criterion=QUICK), x, pruning_ratio=0.5, global_pruning=ranked
    )
    every = torch.cat([*expected.values()]).sort().values
    threshold = every[len(every) // 2]
    gone = {root: sorted(channels) for root, _, channels in history}
    for root, scores in expected.items():
        count = int((scores < threshold).sum()) if ranked else len(scores) // 2
        assert gone.get(root, []) == sorted(scores.argsort()[:count].tolist()), root
    assert model(x).shape == (8, 10)


def test_every_step_is_scored_on_the_network_as_it_is_then_and_on_the_batch_of_then():
    model, (x, y) = digit_net()
    importance = singe.SingeImportance(model, (x, y), criterion=QUICK)
    pruned_by(model, importance, x, pruning_ratio=0.5, iterative_steps=2)
    importance.batch = images(6, channels=1, classes=10, seed=9)
    root, group = next(iter(grouped(model, x).items()))
    assert torch.equal(importance(group), singe.score(model, importance.batch, root, criterion=QUICK))


def test_the_model_its_modes_and_the_random_state_are_as_before():
    model, batch = randomised(MobileNet()).train(), images(8)
    kept, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    group = grouped(model, batch[0])["stem.0"]
    model.train()
    with torch.no_grad():
        singe.SingeImportance(model, batch, criterion="random")(group)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in kept.items() if "running" not in k and "num_batches" not in k)
    assert all(p.grad is None for p in model.parameters())


def test_forward_and_loss_are_the_users():
    model = Wired(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 4))
    batch = {"x": normal(8, 5), "y": normal(8, 4)}
    options = {"forward": lambda m, b: m(b["x"]), "loss": lambda o, b: (o - b["y"]).square().mean()}
    scores = singe.SingeImportance(model, batch, **options)(grouped(model, batch["x"])["a"])
    assert torch.equal(scores, singe.score(model, batch, "a", **options))


def test_torch_pruning_takes_it_for_one_of_its_own():
    model, batch = digit_net()
    assert isinstance(singe.SingeImportance(model, batch), tp.importance.Importance)


def test_what_has_no_scores_stays_and_that_is_said(caplog):
    model, (x, y) = digit_net()
    importance = singe.SingeImportance(model, (x, y), criterion="reconstruction")
    groups = grouped(model, x)
    assert importance(groups["head"]) is None
    assert "no scores for the channels of head, which stay" in caplog.text
    assert len(importance(groups["blocks.1.conv1"])) == 8


def test_a_group_of_another_model_is_refused():
    (model, batch), (other, _) = digit_net(), digit_net()
    with pytest.raises(ValueError, match="group of the DigitNet given"):
        singe.SingeImportance(model, batch)(grouped(other, batch[0])["stem"])


def test_bad_input_is_refused_before_any_group(monkeypatch):
    model, (x, y) = digit_net()
    with pytest.raises(TypeError, match=r"batch \(x, y\)"):
        singe.SingeImportance(model, x)
    with pytest.raises(ValueError, match="criterion"):
        singe.SingeImportance(model, (x, y), criterion="taylor")
    with pytest.raises(ValueError, match="memory >= 1"):
        singe.SingeImportance(model, (x, y), memory=0)
    monkeypatch.setitem(sys.modules, "torch_pruning.pruner.importance", None)
    with pytest.raises(ImportError, match="pip install torch-pruning"):
        singe.SingeImportance(model, (x, y))
