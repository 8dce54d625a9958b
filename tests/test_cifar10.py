import pytest
import torch
from records import PER_FILE, write_records

from singe.cifar10 import Loader, Ordered, normalised, read

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Canonical files of random records, few in each."""
    return write_records(tmp_path_factory.mktemp("cifar10"))


def test_read_keeps_records_in_order(data):
    images, labels = read(data, train=True)
    record = (data / "data_batch_2.bin").read_bytes()[3073 * 5 : 3073 * 6]
    assert images.shape == (5 * PER_FILE, 3, 32, 32) and images.dtype == torch.uint8
    assert labels[PER_FILE + 5] == record[0]
    assert images[PER_FILE + 5, 1, 2, 3] == record[1 + 1024 + 2 * 32 + 3]
    assert len(read(data, train=False)[0]) == PER_FILE


def test_read_names_the_file_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin is missing.*binary version of CIFAR-10"):
        read(tmp_path, train=False)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b"\x0a" + b[1:]])
def test_read_refuses_a_file_that_is_not_made_of_records(tmp_path, damage):
    file = write_records(tmp_path) / "data_batch_3.bin"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"data_batch_3\.bin.*records of 3073 bytes"):
        read(tmp_path, train=True)


def test_a_seed_makes_batches_repeatable(data):
    loader = Loader(*read(data, train=True), batch_size=32)

    def epoch(seed):
        torch.manual_seed(seed)
        return [torch.cat(parts) for parts in zip(*loader, strict=True)]

    (x, y), (again, y_again), (other, _) = epoch(0), epoch(0), epoch(1)
    assert torch.equal(x, again) and torch.equal(y, y_again)
    assert not torch.equal(x, other)


def test_augmented_images_are_crops_of_the_padded_ones_or_their_mirrors(data):
    images, labels = (part[:16] for part in read(data, train=True))
    torch.manual_seed(0)
    order = torch.randperm(16)
    torch.manual_seed(0)
    ((batch, y),) = Loader(images, labels, batch_size=16)
    assert torch.equal(y, labels[order])
    padded = torch.nn.functional.pad(normalised(images[order]), (4, 4, 4, 4))
    shifts, flips = set(), set()
    for image, whole in zip(batch, padded, strict=True):
        crops = {(i, j): whole[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)}
        found = [(at, flip) for at, crop in crops.items() for flip in (False, True)
                 if torch.equal(image, crop.flip(2) if flip else crop)]  # fmt: skip
        assert len(found) == 1
        shifts.add(found[0][0])
        flips.add(found[0][1])
    assert len(shifts) > 8 and flips == {False, True}


def test_without_augmentation_images_are_as_they_are(data):
    images, labels = read(data, train=True)
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    torch.manual_seed(0)
    ((x, y),) = Loader(images, labels, batch_size=len(images), augment=False)
    assert torch.equal(x, normalised(images[order])) and torch.equal(y, labels[order])


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_where_the_images_are_and_the_same_on_every_device(data, device):
    images, labels = read(data, train=True)
    batches = []
    for part in (images, labels), (images.to(device), labels.to(device)):
        torch.manual_seed(0)
        batches.append(next(iter(Loader(*part, batch_size=32))))
    (x, y), (x_there, y_there) = batches
    assert x_there.device.type == y_there.device.type == device
    torch.testing.assert_close(x_there.cpu(), x)
    assert torch.equal(y_there.cpu(), y)


@pytest.mark.parametrize("size", [0, 5 * PER_FILE + 1])
def test_a_batch_has_at_least_one_image_and_no_more_than_there_are(data, size):
    with pytest.raises(ValueError, match=f"batch size from 1 to {5 * PER_FILE}.*got {size}"):
        Loader(*read(data, train=True), batch_size=size)


def test_ordered_batches_hold_every_image_once_and_as_it_is(data):
    images, labels = read(data, train=False)
    for _ in range(2):
        batches = list(Ordered(images, labels, batch_size=12))
        assert [len(x) for x, _ in batches] == [12, 12, 8]
        assert torch.equal(torch.cat([x for x, _ in batches]), normalised(images))
        assert torch.equal(torch.cat([y for _, y in batches]), labels)
