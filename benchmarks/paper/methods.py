"""The methods of singe that tables name: arguments of ``singe.prune``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import singe

NODES = singe.GaussLegendre(4)
"""Nodes of the paper's criteria: more than the default, to be safe, though they rank no better."""

METHODS: dict[str, Mapping[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "magnitude, global": {"criterion": "magnitude", "allocation": "global"},
    "magnitude + least squares": {"criterion": "magnitude", "compensate": "least_squares"},
    "integrated gradient": {"criterion": singe.IntegratedGradient(quadrature=NODES)},  # the paper's; others by default
    "integrated gradient, global": {"criterion": "integrated_gradient", "allocation": "global"},
    "integrated gradient + least squares": {"criterion": "integrated_gradient", "compensate": "least_squares"},
    "reconstruction": {"criterion": "reconstruction"},
    "reconstruction + least squares": {"criterion": "reconstruction", "compensate": "least_squares"},
    "reconstruction + least squares, sensitivity": {
        "criterion": "reconstruction",
        "compensate": "least_squares",
        "allocation": "sensitivity",
    },
    "magnitude, sensitivity": {"criterion": "magnitude", "allocation": "sensitivity"},
    "magnitude + least squares, sensitivity": {
        "criterion": "magnitude",
        "compensate": "least_squares",
        "allocation": "sensitivity",
    },
    "integrated gradient, sensitivity": {"criterion": "integrated_gradient", "allocation": "sensitivity"},
    "integrated gradient + least squares, sensitivity": {
        "criterion": "integrated_gradient",
        "compensate": "least_squares",
        "allocation": "sensitivity",
    },
    "random": {"criterion": "random"},
    "random + least squares": {"criterion": "random", "compensate": "least_squares"},
    "random + least squares, sensitivity": {
        "criterion": "random",
        "compensate": "least_squares",
        "allocation": "sensitivity",
    },
}
"""The methods that peers.py compares with others. A new method is a line here."""

PAPER, BEST = "integrated gradient", "reconstruction + least squares, sensitivity"
"""The paper's method, and the best of all above."""

CRITERIA: dict[str, singe.criteria.Criterion] = {
    "random": singe.criteria.Random(),
    "L1": singe.criteria.Magnitude(1),
    "L2": singe.criteria.Magnitude(),
    "gradient": singe.criteria.Gradient(),
    "L2 × gradient": singe.criteria.MagnitudeGradient(),
    "SG": singe.criteria.SummedGradient(quadrature=NODES),
    "IG": singe.criteria.IntegratedGradient(quadrature=NODES),
    "IG, layer path": singe.criteria.IntegratedGradient(quadrature=NODES, path="layer"),
    "loss change": singe.criteria.LossChange(),
    "reconstruction": singe.criteria.Reconstruction(),
}
"""The criteria of the paper's table 1, and singe's other ones."""
