import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    StackDataset,
    TensorDataset,
)

from singe.models.isolation import counting_epochs, plain_torch, preserved_random_state, seed_everything

DATA = TensorDataset(torch.arange(20.0))


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_every_generator_goes_on_as_if_nothing_had_happened():
    seed_everything(1)
    expected = [draw(), draw()]
    seed_everything(1)
    first = draw()
    with preserved_random_state():
        seed_everything(7)
        draw()
    assert [first, draw()] == expected


def test_also_after_an_exception():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with pytest.raises(KeyError), preserved_random_state():
        seed_everything(3)
        draw()
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


class Noisy(Dataset):
    """Draws from a generator of its own."""

    def __init__(self, generator):
        self.generator = generator

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return (torch.rand(1, generator=self.generator),)


@pytest.mark.parametrize("where", ["loader", "sampler", "one of several datasets", "one of several in a mapping"])
def test_the_loaders_own_generator_is_seeded_and_given_back(where):
    generator = torch.Generator().manual_seed(4)
    if where == "loader":
        loader = DataLoader(DATA, batch_size=5, shuffle=True, generator=generator)
    elif where == "sampler":
        loader = DataLoader(DATA, batch_size=5, sampler=RandomSampler(DATA, generator=generator))
    elif where == "one of several datasets":
        loader = DataLoader(ConcatDataset([DATA, Noisy(generator)]), batch_size=5)
    else:
        data = StackDataset(x=TensorDataset(torch.arange(10.0)), noise=Noisy(generator))
        loader = DataLoader(data, batch_size=5, collate_fn=lambda rows: [rows[0]["noise"][0]])
    state = generator.get_state()
    orders = []
    with preserved_random_state(loader):
        for _ in range(2):
            seed_everything(8, loader)
            orders.append([x.tolist() for (x,) in loader])
    assert orders[0] == orders[1]
    assert torch.equal(generator.get_state(), state)


def test_the_same_seed_draws_the_same_and_another_seed_something_else():
    draws = []
    for seed in (2, 2, 3):
        with preserved_random_state():
            seed_everything(seed)
            draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[1], draws[2], strict=True))


@pytest.mark.parametrize("seed", [0, -1, 2**40])
def test_seeds_beyond_what_numpy_takes_are_seeds_too(seed):
    with preserved_random_state():
        seed_everything(seed)
        first = draw()
        seed_everything(seed)
        assert draw() == first


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="needs a process that has not used CUDA yet")
def test_a_cuda_context_that_starts_later_keeps_the_users_seed(monkeypatch):
    queued = []  # torch keeps the last seed for when CUDA starts
    monkeypatch.setattr(torch.cuda, "manual_seed_all", queued.append)
    with preserved_random_state():
        seed_everything(7)
    assert queued == []


def test_the_epoch_that_a_sampler_counts_is_given_back():
    loader = DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=0))
    loader.sampler.set_epoch(3)
    with preserved_random_state(loader):
        assert counting_epochs(loader) == [loader.sampler]
        loader.sampler.set_epoch(8)
    assert loader.sampler.epoch == 3


def test_weights_that_change_are_cast_anew_in_a_models_own_autocast():
    layer = torch.nn.Linear(3, 3)  # with weights that require a gradient, which autocast keeps casts of
    x = torch.ones(2, 3)
    with plain_torch(x.device):
        found = []
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(layer(x).float())
            with torch.no_grad():
                layer.weight.mul_(3), layer.bias.mul_(3)
    assert torch.allclose(found[1], 3 * found[0], rtol=0.02, atol=0.02) and not torch.allclose(found[1], found[0])
