import sys
import types

import pytest
import torch
from PIL import Image

from singe import cifar10
from singe.cli.datasets import First, Settings, load

CPU = torch.device("cpu")


def test_cifar10_is_augmented_to_train_on_and_in_order_to_test_on(cifar):
    data = load("cifar10:cifar", Settings(batch_size=32), CPU)
    assert isinstance(data.train, cifar10.Loader) and [len(x) for x, _ in data.train] == [32] * 5
    ((x, y),) = data.test
    images, labels = cifar10.read(cifar, train=False)
    assert torch.equal(x, cifar10.normalised(images)) and torch.equal(y, labels)
    assert [len(x) for x, _ in load("cifar10:cifar", Settings(), CPU).train] == [128]


@pytest.mark.parametrize("settings", [Settings(workers=2), Settings(image_size=64)])
def test_what_cifar10_does_not_have_cannot_be_said(cifar, settings):
    with pytest.raises(ValueError, match=r"(workers|image_size) does not apply to cifar10:DIR"):
        load("cifar10:cifar", settings, CPU)


def test_loaders_of_ones_own(place):
    data = load("nets:some", Settings(), CPU)
    assert data.train is sys.modules["nets"].some and data.test is None
    assert len(load("nets:batches(count=5)", Settings(), CPU).train) == 5
    data = load("nets:split", Settings(batch_size=4), CPU)
    assert [len(x) for x, _ in data.train] == [4] * 3 and [len(x) for x, _ in data.test] == [4]


@pytest.mark.parametrize(
    "reference, settings, message",
    [
        ("nets:split", Settings(workers=2, image_size=3), "nets:split takes no workers and no image_size"),
        ("nets:some", Settings(batch_size=2), "batch_size cannot be passed to nets:some"),
        ("nets:number", Settings(), "expected batches .* from nets:number, got int"),
        ("nets:broken", Settings(), "nets:broken failed"),
        ("cifar10", Settings(), r"expected cifar10:DIR, imagefolder:DIR or package\.module:loader, got 'cifar10'"),
        ("nets:none", Settings(), "expected 'none' in nets"),
    ],
)
def test_what_names_no_data_is_refused(place, reference, settings, message):
    with pytest.raises(ValueError, match=message):
        load(reference, settings, CPU)


def test_missing_files_are_refused(place):
    with pytest.raises(FileNotFoundError, match=r"data_batch_1\.bin is missing"):
        load("cifar10:nowhere", Settings(), CPU)


# -- folders of images: torchvision's part is played by a few lines here, as it is not installed with the tests --------


class Folder:
    def __init__(self, root, transform):
        self.classes = sorted(path.name for path in root.iterdir())
        self.files = [(file, label) for label, name in enumerate(self.classes) for file in (root / name).iterdir()]
        self.transform = transform

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        file, label = self.files[index]
        return self.transform(Image.open(file)), label


def transforms():
    """The names that are used, which write down what they were asked for."""

    def step(name):
        return lambda *given: lambda x: (*x, (name, given)) if isinstance(x, tuple) else ((name, given),)

    names = ["RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize", "Resize", "CenterCrop"]
    module = types.ModuleType("transforms")
    for name in names:
        setattr(module, name, step(name))

    def compose(steps):
        def run(image):
            for step in steps:
                image = step(image)
            module.seen.append(image)
            return torch.zeros(3, 4, 4)

        return run

    module.Compose, module.seen = compose, []
    return module


@pytest.fixture
def vision(monkeypatch):
    package, datasets, steps = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets"), transforms()
    datasets.ImageFolder, package.transforms, package.datasets = Folder, steps, datasets
    for name, module in {"torchvision": package, "torchvision.datasets": datasets}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return steps


@pytest.fixture
def folders(place):
    for part, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (place / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (i, 0, 0)).save(place / "images" / part / name / f"{i}.png")
    return place / "images"


def test_folders_are_shuffled_and_augmented_to_train_on_and_the_middle_is_tested_on(vision, folders):
    data = load("imagefolder:images", Settings(batch_size=4, image_size=56), CPU)
    assert [len(x) for x, _ in data.train] == [4]  # what is not a full batch is left out
    assert {tuple(name for name, _ in seen) for seen in vision.seen} == {
        ("RandomResizedCrop", "RandomHorizontalFlip", "ToTensor", "Normalize")
    }
    vision.seen.clear()
    assert torch.cat([y for _, y in data.test]).tolist() == [y for _, y in data.test.dataset]
    assert sorted(y for _, y in data.test.dataset) == [0, 0, 1, 1]
    names = [name for name, _ in vision.seen[0]]
    given = dict(vision.seen[0])
    assert names == ["Resize", "CenterCrop", "ToTensor", "Normalize"]
    assert given["Resize"] == (64,) and given["CenterCrop"] == (56,)


def test_folders_without_test_images_have_none(vision, folders):
    (folders / "val").rename(folders / "other")
    assert load("imagefolder:images", Settings(batch_size=2), CPU).test is None


def test_folders_that_cannot_be_used_are_refused(vision, folders):
    with pytest.raises(ValueError, match="batch size of at most 6, the number of images, got 128"):
        load("imagefolder:images", Settings(), CPU)
    (folders / "val" / "dog").rename(folders / "val" / "wolf")
    with pytest.raises(ValueError, match="expected the same classes in train/ and val/"):
        load("imagefolder:images", Settings(batch_size=2), CPU)
    with pytest.raises(FileNotFoundError, match="expected a folder train/"):
        load("imagefolder:images/val", Settings(), CPU)


def test_without_torchvision_the_message_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'singe\[vision\]'"):
        load("imagefolder:images", Settings(), CPU)


def test_the_first_samples_end_within_a_batch():
    batches = [(torch.zeros(4, 2), torch.zeros(4)), (torch.ones(4, 2), torch.ones(4))]
    assert [len(x) for x, _ in First(batches, 6)] == [4, 2]
    assert [len(x) for x, _ in First(batches, 4)] == [4]
    assert [len(x) for x, _ in First(batches, 99)] == [4, 4]
