"""Small networks with the structures of real ones, written as those are, so that they export to the same operators."""

from __future__ import annotations

from .attention import ATTENTION
from .dense_prediction import DENSE_PREDICTION
from .entry import Entry
from .mobile import MOBILE
from .modern import MODERN
from .other_inputs import OTHER_INPUTS
from .plain import PLAIN
from .residual import RESIDUAL
from .weights import WEIGHTS

ZOO: dict[str, Entry] = {
    **PLAIN, **RESIDUAL, **MOBILE, **MODERN, **ATTENTION, **DENSE_PREDICTION, **OTHER_INPUTS, **WEIGHTS
}  # fmt: skip

__all__ = ["ZOO", "Entry"]
