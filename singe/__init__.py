"""Pruning by integrated gradients along a weight-fading path (SInGE, Yvinec et al., NeurIPS 2022)."""

from . import reference, report
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
from .forecast import Forecast, forecast
from .gradual import GradualPruner
from .inspection import GroupInfo, Inspection, inspect
from .latency import Latency, latencies, latency
from .plan import Plan
from .presets import gradual_preset
from .prune import prune
from .quadrature import GaussLegendre, Geometric
from .records import Curve, GroupRecord, LatencyChange, RoundRecord, WeightRecord
from .result import PruneResult
from .saved import load, load_plan
from .score import score
from .sparse import SparseResult
from .tensorboard import TensorBoard
from .torch_pruning import SingeImportance

__version__ = "0.1.0"

__all__ = [
    "Curve",
    "FeatureRelevance",
    "FineTune",
    "Folding",
    "Forecast",
    "GaussLegendre",
    "Geometric",
    "Gradient",
    "GradualPruner",
    "GroupInfo",
    "GroupRecord",
    "Inspection",
    "IntegratedGradient",
    "Latency",
    "LatencyChange",
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
    "TensorBoard",
    "WeightRecord",
    "export_onnx",
    "fold_batchnorm",
    "forecast",
    "gradual_preset",
    "inspect",
    "latencies",
    "latency",
    "load",
    "load_plan",
    "prune",
    "reference",
    "report",
    "score",
]
