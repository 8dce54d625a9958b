import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from singe.data import Stream

CPU = torch.device("cpu")


def numbered(count, **options):
    """A loader whose images are 1, 2, ... with the labels 0, 1, ..."""
    dataset = TensorDataset(torch.arange(1.0, count + 1)[:, None], torch.arange(count))
    return DataLoader(dataset, **options)


def labels(stream, batches):
    return [stream.next()[1].tolist() for _ in range(batches)]


def test_batches_come_in_the_loaders_order_again_and_again():
    stream = Stream(numbered(5, batch_size=2), CPU)
    assert labels(stream, 7) == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4], [0, 1]]


def test_x_and_y_stay_together():
    stream = Stream(numbered(7, batch_size=3, shuffle=True), CPU)
    for _ in range(6):
        x, y = stream.next()
        assert torch.equal(x[:, 0], y + 1.0)


def test_an_epoch_of_a_shuffling_loader_holds_every_image_once():
    stream = Stream(numbered(9, batch_size=2, shuffle=True), CPU)
    for _ in range(2):
        assert sorted(i for batch in labels(stream, 5) for i in batch) == list(range(9))


@pytest.mark.parametrize(
    "loader",
    [
        lambda: numbered(20, batch_size=3, shuffle=True),
        lambda: numbered(20, batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(9)),
        lambda: numbered(20, batch_size=3, sampler=RandomSampler(range(20), generator=torch.Generator())),
    ],
    ids=["global generator", "own generator", "sampler with a generator"],
)
def test_a_restart_with_the_same_seed_repeats_what_followed(loader):
    stream = Stream(loader(), CPU)
    stream.restart(5)
    first = labels(stream, 10)
    stream.restart(6)
    other = labels(stream, 10)
    stream.next()
    stream.restart(5)
    assert labels(stream, 10) == first
    assert other != first


def test_a_restart_begins_a_new_epoch_in_the_middle_of_one():
    stream = Stream(numbered(6, batch_size=2), CPU)
    labels(stream, 2)
    stream.restart(0)
    assert labels(stream, 1) == [[0, 1]]


@pytest.mark.parametrize("images", [1, 2, 3, 5, 12])
def test_take_joins_or_cuts_batches_to_the_exact_number_of_images(images):
    x, y = Stream(numbered(5, batch_size=2), CPU).take(images)
    assert y.tolist() == [i % 5 for i in range(images)]
    assert torch.equal(x[:, 0], y + 1.0)


def test_a_list_of_batches_is_a_loader():
    batch = (torch.ones(2, 1), torch.zeros(2))
    assert Stream([batch], CPU).take(5)[0].shape == (5, 1)


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Stream([], CPU).next()


@pytest.mark.parametrize(
    "loader", [(b for b in [(torch.ones(1, 1), torch.ones(1))]), iter([])], ids=["generator", "iterator"]
)
def test_a_loader_that_can_be_read_only_once_is_refused(loader):
    with pytest.raises(TypeError, match="one-shot"):
        Stream(loader, CPU)


@pytest.mark.parametrize("loader", [None, 3, TensorDataset(torch.ones(2, 1))], ids=["None", "int", "dataset"])
def test_what_is_no_iterable_is_refused(loader):
    with pytest.raises(TypeError, match="iterable"):
        Stream(loader, CPU)


def test_a_batch_that_is_none_is_named_and_not_taken_for_the_end():
    with pytest.raises(TypeError, match=r"\(x, y\).*NoneType"):
        Stream([None], CPU).next()


def test_images_of_different_sizes_cannot_be_joined_and_the_message_says_so():
    batches = [(torch.ones(2, 3, s, s), torch.zeros(2, dtype=torch.int64)) for s in (8, 6)]
    with pytest.raises(ValueError, match=r"size|shape"):
        Stream(batches, CPU).take(4)
