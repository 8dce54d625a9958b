"""Trains a network on CIFAR-10 from scratch; writes its weights, and its accuracy into a JSON beside them.

python benchmarks/train_cifar10.py --model resnet20 --data CIFAR10_DIR --out resnet20.safetensors [--device cuda --bf16]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring.common import settings, write_json
from models import CIFAR10_MODELS, load
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from singe.cifar10 import Loader, Ordered, read
from singe.sizes import count_parameters
from singe.training.accuracy import accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    images, labels = (part.to(options.device) for part in read(options.data, train=True))
    test_images, test_labels = (part.to(options.device) for part in read(options.data, train=False))
    loader = Loader(images, labels, options.batch_size)
    model = load(options.model).to(options.device, memory_format=torch.channels_last)

    start = time.perf_counter()
    top1 = train(model, loader, (test_images, test_labels), options)
    seconds = time.perf_counter() - start

    options.out.parent.mkdir(parents=True, exist_ok=True)
    # safetensors takes contiguous tensors only, and those of convolutions are in channels_last
    save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, options.out)
    result = {
        "options": settings(options),
        "parameters": count_parameters(model),
        "top1": top1[-1],
        "top1_of_epochs": top1,
        "seconds": seconds,
    }
    write_json(options.out.with_suffix(".json"), result)
    print(f"{options.model}: {top1[-1]:.2%} on {len(test_images):,} test images")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CIFAR10_MODELS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a safetensors file")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.2, help="at the top of the cycle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16 while training")
    return parser.parse_args(arguments)


def train(
    model: nn.Module,
    loader: Loader,
    test: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    epoch_end: Callable[[Loader], object] | None = None,
) -> list[float]:
    """Trains in place; returns the accuracy on ``test`` after each epoch.

    Args:
        model: in any mode; left in eval mode.
        loader: of training images.
        test: images and labels.
        options: epochs, lr and bf16.
        epoch_end: called after each epoch, before it is tested.
    """
    weight_groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(weight_groups, lr=options.lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, epochs=options.epochs, steps_per_epoch=len(loader), cycle_momentum=False
    )
    top1: list[float] = []
    with tqdm(total=options.epochs * len(loader), unit="step") as bar:
        for _ in range(options.epochs):
            model.train()
            for x, y in loader:
                with torch.autocast(x.device.type, torch.bfloat16, enabled=options.bf16):
                    loss = F.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if epoch_end is not None:
                epoch_end(loader)
            top1.append(accuracy(model, Ordered(*test)))
            bar.set_postfix(loss=f"{loss.item():.3f}", top1=f"{top1[-1]:.2%}")
    model.eval()
    return top1


if __name__ == "__main__":
    main()
