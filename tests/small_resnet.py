"""A network of the benchmarks', as small as it gets."""

from __future__ import annotations

from models.cifar import CifarResNet


class SmallResNet(CifarResNet):
    """One block in a stage."""

    def __init__(self) -> None:
        super().__init__(1)
