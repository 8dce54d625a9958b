"""Pruning by integrated gradients along a weight-fading path (SInGE, Yvinec et al., NeurIPS 2022)."""

from . import reference
from .criteria import (
    FeatureRelevance,
    Gradient,
    IntegratedGradient,
    LossChange,
    Magnitude,
    MagnitudeGradient,
    Random,
    Reconstruction,
    SummedGradient,
)
from .export import export_onnx
from .finetune import FineTune
from .folding import Folding, fold_batchnorm
from .gradual import GradualPruner
from .inspection import GroupInfo, Inspection, inspect
from .plan import Plan
from .presets import gradual_preset
from .prune import prune
from .quadrature import GaussLegendre, Geometric
from .result import GroupRecord, PruneResult, RoundRecord
from .saved import load, load_plan
from .score import score
from .sparse import SparseResult, WeightRecord
from .torch_pruning import SingeImportance

__version__ = "0.1.0"

__all__ = [
    "FeatureRelevance",
    "FineTune",
    "Folding",
    "GaussLegendre",
    "Geometric",
    "Gradient",
    "GradualPruner",
    "GroupInfo",
    "GroupRecord",
    "Inspection",
    "IntegratedGradient",
    "LossChange",
    "Magnitude",
    "MagnitudeGradient",
    "Plan",
    "PruneResult",
    "Random",
    "Reconstruction",
    "RoundRecord",
    "SingeImportance",
    "SparseResult",
    "SummedGradient",
    "WeightRecord",
    "export_onnx",
    "fold_batchnorm",
    "gradual_preset",
    "inspect",
    "load",
    "load_plan",
    "prune",
    "reference",
    "score",
]
