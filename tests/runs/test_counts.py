import pytest
import torch
from networks import PlainNet, images, randomised
from torch.utils.data import DataLoader, TensorDataset

import singe
from singe.models.batches import length
from singe.runs import counts
from singe.scoring import scores


def batches_that_order(monkeypatch, model, x, **options):
    """How many samples the scores before the first group's turn are of, group by group."""
    seen = []

    class Watched(scores.Engine):
        def __init__(self, work, trace, group, batch, *rest):
            seen.append(length(batch))
            super().__init__(work, trace, group, batch, *rest)

    monkeypatch.setattr(scores, "Engine", Watched)
    loader = DataLoader(TensorDataset(x, torch.arange(len(x)) % 4), batch_size=24, shuffle=True)
    result = singe.prune(
        model, loader, 0.3, images=24, finetune=None, compensate="none", progress=False, **options
    )  # fmt: skip
    turns = len(result.history)
    assert seen[-turns:] == [24] * turns  # all samples, once neurons go
    return set(seen[:-turns])


@pytest.mark.parametrize(("allocation", "samples"), [("sensitivity", {16}), ("global", {24}), ("uniform", set())])
def test_neurons_are_ordered_on_few_samples_where_the_loss_is_measured_anyway(allocation, samples, monkeypatch):
    x, _ = images(48)
    assert batches_that_order(monkeypatch, randomised(PlainNet()), x, allocation=allocation) == samples


def test_a_network_that_fixes_its_batch_is_ordered_on_all_of_it(monkeypatch):
    class Fixed(PlainNet):
        def forward(self, x):
            return super().forward(x).reshape(24, 4)

    assert batches_that_order(monkeypatch, randomised(Fixed()), images(48)[0]) == {24}


@pytest.mark.parametrize(("count", "memory", "least", "most"), [
    (24, 1 << 30, 24, 24), (24, 1 << 18, 8, 10), (23, 1 << 18, 6, 10), (23, 1 << 30, 23, 23), (23, 1 << 10, 1, 1),
])  # fmt: skip
def test_what_the_loss_is_measured_on_fits_the_memory_and_fills_it(count, memory, least, most, monkeypatch):
    seen = []

    class Watched(counts.Sensitivity):
        def __init__(self, model, trace, batches, *rest):
            seen.extend(map(length, batches))
            super().__init__(model, trace, batches, *rest)

    monkeypatch.setattr(counts, "Sensitivity", Watched)
    loader = DataLoader(TensorDataset(*images(48)), batch_size=24, shuffle=True)
    arguments = {"criterion": "magnitude", "compensate": "none", "finetune": None, "progress": False}
    singe.prune(randomised(PlainNet()), loader, 0.3, images=count, memory=memory, **arguments)
    assert len(set(seen)) == 1 and least <= seen[0] <= most
    assert counts.SAMPLES <= sum(seen) < counts.SAMPLES + count
