"""Prune while you train: the least relevant channels are masked at fixed epochs of your own loop, then cut out."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import singe
from singe.demo import DigitNet, digits


def main(width=16, epochs=12, every=2, per_round=24, until=8):
    torch.manual_seed(0)
    training, test = digits()
    loader, test = DataLoader(training, batch_size=64, shuffle=True), DataLoader(test, batch_size=360)
    model = DigitNet(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    example, _ = next(iter(loader))
    pruner = singe.GradualPruner(model, example, every=every, per_round=per_round, until=until, images=256)
    for epoch in range(1, epochs + 1):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()  # masked weights stay zero
        done = pruner.epoch_end(loader)
        masked = f", {done.channels} channels masked" if done else ""
        print(f"epoch {epoch}: {singe.accuracy(model, test):.1%}{masked}")

    result = pruner.finish()
    print(result)
    return result


if __name__ == "__main__":
    main()
