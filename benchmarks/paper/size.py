"""How much of a table is run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What a script runs where the options do not say.

    Attributes:
        rates: shares of the parameters to remove.
        steps: of fine-tuning; 0 for none.
        seeds: of everything random.
    """

    rates: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
