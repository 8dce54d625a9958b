import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from singe.ranks import Ranks
from singe.training.data import Stream

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


def test_take_looks_at_every_batch_once(monkeypatch):
    looked = []
    monkeypatch.setattr("singe.training.data.length", lambda batch: looked.append(batch) or 1)
    Stream(numbered(5), CPU).take(40)
    assert len(looked) <= 41  # the first one once more


def test_the_log_says_when_a_small_loader_is_read_over_and_over(caplog):
    caplog.set_level("INFO", "singe")
    stream = Stream(numbered(4, batch_size=2), CPU)
    stream.take(32)
    assert caplog.messages == []
    stream.take(33)
    assert "33 samples took 9 epochs of the loader" in caplog.text


def test_it_knows_when_an_epoch_is_over_and_loses_no_batch_by_looking():
    stream = Stream(numbered(5, batch_size=2), CPU)
    assert stream.epoch_over()
    seen = [(*labels(stream, 1), stream.epoch_over()) for _ in range(4)]
    assert seen == [([0, 1], False), ([2, 3], False), ([4], True), ([0, 1], False)]
    stream.restart(0)
    assert labels(stream, 1) == [[0, 1]]


def test_an_epoch_is_over_when_it_is_on_the_first_rank():
    stream = Stream(numbered(5, batch_size=2), CPU, ranks=Pretended(1, alike=False))
    labels(stream, 3)
    assert not stream.epoch_over() and labels(stream, 1) == [[0, 1]]


def test_a_list_of_batches_is_a_loader():
    batch = (torch.ones(2, 1), torch.zeros(2))
    assert Stream([batch], CPU).take(5)[0].shape == (5, 1)


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="empty"):
        Stream([], CPU).next()


def test_a_loader_that_ends_for_good_is_told_from_an_empty_one():
    class Once:
        def __init__(self):
            self.batches = iter([(torch.ones(2, 1), torch.ones(2))])

        def __iter__(self):
            return iter(list(self.batches))

    stream = Stream(Once(), CPU)
    stream.next()
    with pytest.raises(ValueError, match="got one that yields nothing the second time"):
        stream.next()


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


def test_a_sampler_that_shuffles_by_the_epochs_number_gives_other_batches_in_each_and_the_same_again():
    sampler = DistributedSampler(numbered(12).dataset, num_replicas=2, rank=1)
    stream = Stream(numbered(12, batch_size=3, sampler=sampler), CPU)
    stream.restart(5)
    epochs = [labels(stream, 2) for _ in range(3)]
    assert len({str(epoch) for epoch in epochs}) == 3
    stream.restart(6)
    assert labels(stream, 2) not in epochs
    stream.restart(5)
    assert [labels(stream, 2) for _ in range(3)] == epochs


class Pretended(Ranks):
    """One of two ranks, whose loaders are alike or not."""

    def __init__(self, rank, alike):
        self.rank, self.size, self.group, self.alike = rank, 2, None, alike

    def differing(self, text, tensors=None):
        return [1] if tensors is not None and not self.alike else []

    def from_first(self, values):
        return torch.zeros_like(values)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_draw_the_same_divide_every_batch_by_what_counts(rank):
    stream = Stream(numbered(5, batch_size=5), CPU, ranks=Pretended(rank, alike=True))
    assert stream.take(3)[1].tolist() == [0, 1, 2]
    (_, y), weight = stream.next_share()
    assert y.tolist() == [[0, 2, 4], [1, 3]][rank] and weight == [6 / 5, 4 / 5][rank]


def test_ranks_that_draw_different_batches_keep_them_to_train_on_and_score_on_the_first_ranks():
    stream = Stream(numbered(4, batch_size=2), CPU, ranks=Pretended(1, alike=False))
    assert stream.take(3)[1].tolist() == [0, 0, 0]
    (_, y), weight = stream.next_share()
    assert y.tolist() == [0, 1] and weight == 1


def test_a_batch_with_fewer_samples_than_ranks_is_refused():
    stream = Stream(numbered(1), CPU, ranks=Pretended(1, alike=True))
    stream.take(1)
    with pytest.raises(ValueError, match="a sample for each of 2 ranks, got 1; try drop_last"):
        stream.next_share()
