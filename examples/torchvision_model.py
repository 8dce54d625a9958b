"""A network of torchvision: python examples/torchvision_model.py mobilenet_v2 --data imagenet/train

Without --data it has random weights and sees noise, which shows what is removed and how long that takes, but no
accuracy.
"""

import argparse

from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

import singe


def main(name="resnet18", data=None, size=224, count=256, batch=32, rho=0.3, steps=1000, images=64):
    if data is None:
        model = models.get_model(name)
        dataset = datasets.FakeData(count, (3, size, size), num_classes=1000, transform=transforms.ToTensor())
    else:  # a folder for each class, in the order of ImageNet
        weights = models.get_model_weights(name).DEFAULT
        model, dataset = models.get_model(name, weights=weights), datasets.ImageFolder(data, weights.transforms())
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=0 if data is None else 8)

    print(singe.inspect(model, next(iter(loader))[0][:2]))  # which channels can be removed, which cannot and why
    result = singe.prune(model, loader, rho, target="macs", images=images, finetune=singe.FineTune(steps=steps))
    print(result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="resnet18")
    parser.add_argument("--data", help="a folder of images for each class")
    parser.add_argument("--rho", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=1000)
    main(**vars(parser.parse_args()))
