"""The published settings of gradual pruning (Aketi et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypedDict

from . import values


@dataclass(frozen=True)
class _Published:
    """Channels per round, epochs between rounds, the last epoch with a round, and the number of epochs."""

    per_round: int
    every: int
    until: int
    epochs: int


_PUBLISHED = {
    "vgg16_cifar10": _Published(160, 15, 150, 200),
    "vgg16_cifar100": _Published(100, 15, 150, 200),
    "resnet56_cifar": _Published(120, 21, 150, 200),
    "resnet110_cifar": _Published(120, 21, 150, 200),
    "resnet34_imagenet": _Published(250, 9, 50, 90),
}


class Rounds(TypedDict):
    """When a ``GradualPruner`` masks channels, and how many; see there."""

    every: int
    per_round: int
    until: int


def gradual_preset(name: str, epochs: int | None = None) -> Rounds:
    """Published settings as arguments: ``GradualPruner(model, x, **gradual_preset("resnet110_cifar"))``.

    Args:
        name: "vgg16_cifar10", "vgg16_cifar100", "resnet56_cifar", "resnet110_cifar" (200 epochs) or
            "resnet34_imagenet" (90 epochs).
        epochs: how long training takes, if not as long as published. Rounds then come at about the same fractions of
            it, as many of them as fit, and mask as many channels in total.

    Returns:
        ``every``, ``per_round`` and ``until``.

    Raises:
        TypeError, ValueError: no such preset; fewer than two epochs.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"expected a preset among {', '.join(_PUBLISHED)}, got {name!r}")
    published = _PUBLISHED[name]
    total = published.epochs if epochs is None else values.integer("epochs", epochs, 2)
    every = max(1, round(published.every * total / published.epochs))
    until = max(every, published.until * total // published.epochs)
    rounds = published.until // published.every
    if until // every > rounds:  # the epochs between rounds were rounded down
        every = math.ceil(until / rounds)
    return {"every": every, "per_round": round(published.per_round * rounds / (until // every)), "until": until}
