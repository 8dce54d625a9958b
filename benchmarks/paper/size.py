"""How much of a table is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The defaults of a script's options.

    Attributes:
        rates: shares of the parameters to remove.
        steps: of fine-tuning; 0 for none.
        seeds: of everything random.
    """

    rates: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
