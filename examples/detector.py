"""A detector: a backbone, a feature pyramid, two heads that all levels share, and a loss over dicts of targets."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import singe

STRIDES = (4, 8)  # of the two levels of the pyramid
COLOURS = 3


class Squares(Dataset):
    """Images of one coloured square, with a class and a box for every position of every level."""

    def __init__(self, count, size, seed=0):
        self.count, self.size, self.seed = count, size, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(self.seed + index)
        side = int(torch.randint(self.size // 4, self.size // 2, (1,), generator=draw))
        left, top = torch.randint(self.size - side, (2,), generator=draw).tolist()
        colour = int(torch.randint(COLOURS, (1,), generator=draw))
        image = 0.3 * torch.randn(3, self.size, self.size, generator=draw)
        image[colour, top : top + side, left : left + side] += 1

        corners = torch.tensor([left, top, left + side, top + side])
        centres = torch.cat([self.centres(stride) for stride in STRIDES])  # [P, 2]
        sides = torch.cat([centres - corners[:2], corners[2:] - centres], 1) / self.size  # to all four, [P, 4]
        inside = (sides > 0).all(1)
        target = {"classes": torch.where(inside, colour + 1, 0), "boxes": torch.where(inside[:, None], sides, 0.0)}
        return {"image": image, "target": target}

    def centres(self, stride):
        place = torch.arange(stride / 2, self.size, stride)
        y, x = torch.meshgrid(place, place, indexing="ij")
        return torch.stack([x, y], -1).view(-1, 2)


def conv(inputs, outputs, stride=1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Detector(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, 2), conv(width, width))
        self.fine = nn.Sequential(conv(width, 2 * width, 2), conv(2 * width, 2 * width))
        self.coarse = nn.Sequential(conv(2 * width, 4 * width, 2), conv(4 * width, 4 * width))
        self.lateral = nn.ModuleList([nn.Conv2d(2 * width, 2 * width, 1), nn.Conv2d(4 * width, 2 * width, 1)])
        self.tower = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.classes = nn.Conv2d(2 * width, 1 + COLOURS, 1)
        self.boxes = nn.Conv2d(2 * width, 4, 1)

    def forward(self, image):
        fine = self.fine(self.stem(image))
        coarse = self.lateral[1](self.coarse(fine))
        levels = [self.lateral[0](fine) + F.interpolate(coarse, scale_factor=2.0), coarse]
        towers = [F.relu(self.tower(level)) for level in levels]
        return {
            "classes": torch.cat([self.classes(y).flatten(2) for y in towers], 2),  # [B, 1 + COLOURS, P]
            "boxes": torch.cat([self.boxes(y).flatten(2) for y in towers], 2).mT.exp(),  # [B, P, 4]
        }


def forward(model, batch):
    return model(batch["image"])


def loss(outputs, batch):
    target = batch["target"]
    inside = target["classes"] > 0
    classes = F.cross_entropy(outputs["classes"], target["classes"])
    boxes = F.l1_loss(outputs["boxes"], target["boxes"], reduction="none").sum(2)
    return classes + (boxes * inside).sum() / inside.sum().clamp(min=1)


@torch.no_grad()
def found(model, batch):
    """The share of images in which the most confident position names the square's colour."""
    classes = forward(model.eval(), batch)["classes"][:, 1:].softmax(1).amax(2).argmax(1) + 1
    return float((classes == batch["target"]["classes"].amax(1)).float().mean())


def main(count=512, size=64, width=12, epochs=12, rho=0.5, steps=200):
    torch.manual_seed(0)
    loader = DataLoader(Squares(count, size), batch_size=32, shuffle=True)
    test = next(iter(DataLoader(Squares(128, size, seed=count), batch_size=128)))
    model = Detector(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss(forward(model, batch), batch).backward()
            optimizer.step()

    result = singe.prune(model, loader, rho, forward=forward, loss=loss, finetune=singe.FineTune(steps=steps))
    print(result)
    for name, network in (("unpruned", model), ("pruned", result.model)):
        print(f"{name}: {found(network, test):.1%} of the squares found")
    return result


if __name__ == "__main__":
    main()
