"""A network of timm: python examples/timm_model.py vit_tiny_patch16_224 --data imagenet/train

Transformers lose hidden units of the MLPs and whole attention heads. Without --data the network has random weights and
sees noise, which shows what is removed and how long that takes, but no accuracy.
"""

import argparse

import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

import singe


def main(name="vit_tiny_patch16_224", data=None, count=256, batch=32, rho=0.3, steps=1000, images=64):
    model = timm.create_model(name, pretrained=data is not None)
    config = timm.data.resolve_model_data_config(model)
    if data is None:
        dataset = TensorDataset(torch.randn(count, *config["input_size"]), torch.randint(model.num_classes, (count,)))
    else:  # a folder for each class, in the order of ImageNet
        dataset = timm.data.create_dataset("", data, transform=timm.data.create_transform(**config))
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=0 if data is None else 8)

    print(singe.inspect(model, next(iter(loader))[0][:2]))  # which units and heads can be removed, which cannot and why
    result = singe.prune(model, loader, rho, images=images, finetune=singe.FineTune(steps=steps))
    print(result)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="vit_tiny_patch16_224")
    parser.add_argument("--data", help="a folder of images for each class")
    parser.add_argument("--rho", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=1000)
    main(**vars(parser.parse_args()))
