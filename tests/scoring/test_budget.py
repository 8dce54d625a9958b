import pytest
import torch
from networks import images, randomised
from torch import nn

from singe.graph.analysis import find_groups
from singe.graph.trace import trace
from singe.scoring.budget import Budget
from singe.scoring.downstream import Downstream

CPU = torch.device("cpu")
FLOAT, IMAGES, AREA = 4, 10, 64
# conv(3, 5), relu, conv(5, 7), max pool, mean, linear on 8x8 images: bytes of values of so many channels
CHANNEL = IMAGES * AREA * FLOAT


@pytest.fixture
def parts():
    layers = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1), nn.MaxPool2d(3, 1, 1)
    model = randomised(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4)))
    graph = trace(model, images(IMAGES)[0])
    group = next(g for g in find_groups(graph) if g.name == "0")
    return graph, Downstream(graph, group, graph.live(model))


def budget(parts, memory, device=CPU):
    return Budget(*parts, IMAGES, 5, memory, device)


def test_what_one_job_needs_is_counted_by_hand(parts):
    small = (7 + 7 + 4) * IMAGES * FLOAT  # mean, flattened, logits
    values = (5 + 5 + 7 + 7) * CHANNEL + small  # faded, relu, conv, pool
    indices = 7 * CHANNEL * 2  # int64
    gradients = 3 * indices + 5 * CHANNEL
    contribution = 7 * CHANNEL  # of the faded neuron, where they are not kept
    cached = (3 + 5) * CHANNEL  # x and z
    everything = values + indices + gradients + cached
    assert budget(parts, 1 << 30).needed == everything
    assert budget(parts, 1).needed in (everything, everything + contribution)


def test_images_pass_in_even_parts_that_fit(parts):
    needed = budget(parts, 1 << 30).needed
    assert budget(parts, needed).parts() == [10]
    assert budget(parts, needed - 1).parts() == [9, 1]
    assert budget(parts, needed // 3).parts() == [3, 3, 3, 1]
    assert budget(parts, 1).parts() == [1] * 10


def test_contributions_are_kept_if_they_take_a_quarter_at_most(parts):
    contributions = 5 * 7 * CHANNEL
    assert budget(parts, 4 * contributions).keeps_contributions
    assert not budget(parts, 4 * contributions - 1).keeps_contributions


def test_jobs_fill_the_memory_and_on_a_cpu_not_more_than_its_caches(parts):
    down = parts[1]
    gpu = [budget(parts, memory, torch.device("cuda")) for memory in (1 << 22, 1 << 24)]
    few, many = (b.jobs(down.behind, through_front=True) for b in gpu)
    assert 1 < few < many
    assert gpu[0].jobs(down.whole, through_front=True) < few  # the whole suffix takes more
    largest = 2 * 7 * CHANNEL  # the pool's indices
    expected = (2 << 20) * torch.get_num_threads() // largest
    assert budget(parts, 1 << 30).jobs(down.behind, through_front=True) == expected
    assert budget(parts, 1).jobs(down.behind, through_front=True) == 1


def test_the_prefix_takes_as_many_images_as_fit_beside_what_is_cached(parts):
    cached, largest = (3 + 5) * CHANNEL, 5 * CHANNEL
    assert budget(parts, cached + 3 * largest).prefix() == IMAGES
    assert budget(parts, cached + largest).prefix() == IMAGES // 3
    assert budget(parts, 1).prefix() == 1
