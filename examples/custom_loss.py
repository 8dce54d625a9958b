"""A loss of your own on batches of your own: a small U-Net that segments discs and measures their radius."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import singe


def discs(count, size):
    """Noisy images of a disc [count, 1, size, size], the pixels that belong to it, and its radius."""
    place = torch.arange(size).float()
    centre, radius = size * (0.3 + 0.4 * torch.rand(count, 2)), size * (0.1 + 0.2 * torch.rand(count))
    squares = [(place - centre[:, i : i + 1]).square() for i in range(2)]
    mask = (squares[0][:, :, None] + squares[1][:, None] < radius.square()[:, None, None])[:, None].float()
    return TensorDataset(mask + 0.5 * torch.randn_like(mask), mask, radius / size)


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """A mask from the decoder, a radius from the encoder."""

    def __init__(self, width):
        super().__init__()
        self.outer, self.inner = block(1, width), block(width, 2 * width)
        self.decoder, self.mask = block(3 * width, width), nn.Conv2d(width, 1, 1)
        self.radius = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))

    def forward(self, x):
        outer = self.outer(x)
        inner = self.inner(F.max_pool2d(outer, 2))
        both = torch.cat([outer, F.interpolate(inner, scale_factor=2.0)], 1)
        return {"mask": self.mask(self.decoder(both)), "radius": self.radius(inner.mean((2, 3)))[:, 0]}


def forward(model, batch):
    """What the network sees of a batch."""
    image, _mask, _radius = batch
    return model(image)


def loss(outputs, batch):
    """Cross-entropy of pixels, overlap of the mask (Dice), and the square of the radius' error."""
    _image, mask, radius = batch
    found = outputs["mask"].sigmoid()
    dice = 1 - (2 * (found * mask).sum() + 1) / (found.sum() + mask.sum() + 1)
    pixels = F.binary_cross_entropy_with_logits(outputs["mask"], mask)
    return pixels + dice + 10 * F.mse_loss(outputs["radius"], radius)


def main(count=512, size=32, width=12, epochs=12, rho=0.5, steps=200):
    torch.manual_seed(0)
    loader, test = DataLoader(discs(count, size), batch_size=32, shuffle=True), discs(64, size).tensors
    model = UNet(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss(forward(model, batch), batch).backward()
            optimizer.step()

    result = singe.prune(model, loader, rho, forward=forward, loss=loss, finetune=singe.FineTune(steps=steps))
    print(result)
    for name, network in (("unpruned", model), ("pruned", result.model)):
        with torch.no_grad():
            print(f"{name}: loss {loss(forward(network.eval(), test), test):.3f} on other images")
    return result


if __name__ == "__main__":
    main()
