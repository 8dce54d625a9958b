"""Your own training loop: fine-tune a pruned network with it, or prune a network while it trains."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import singe
from singe.demo import DigitNet, digits


def train(model, loader, optimizer, epochs):
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def main(width=16, epochs=6, rho=0.5):
    torch.manual_seed(0)
    training, test = digits()
    loader, test = DataLoader(training, batch_size=64, shuffle=True), DataLoader(test, batch_size=360)
    model = DigitNet(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train(model, loader, optimizer, epochs)
    print(f"trained: {singe.accuracy(model, test):.1%}")

    # finetune=None: neurons are removed and nothing is trained. The result is a module like any other.
    result = singe.prune(model, loader, rho, finetune=None)
    print(f"pruned: {singe.accuracy(result.model, test):.1%}")
    smaller = result.model
    train(smaller, loader, torch.optim.SGD(smaller.parameters(), lr=0.02, momentum=0.9), epochs)
    print(f"fine-tuned: {singe.accuracy(smaller, test):.1%}")

    # Or the model itself gets smaller in the middle of its training, and the optimiser keeps its momentum.
    result.plan.apply(model, optimizer)
    train(model, loader, optimizer, epochs)
    print(f"pruned in place, trained on: {singe.accuracy(model, test):.1%}")
    return smaller, model


if __name__ == "__main__":
    main()
