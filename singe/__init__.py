"""Pruning by integrated gradients along a weight-fading path (SInGE, Yvinec et al., NeurIPS 2022)."""

from . import criteria, reference, report
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
from .folding.fold import Folding, fold_batchnorm
from .forecast import Forecast, forecast
from .gradual import GradualPruner
from .inspection import GroupInfo, Inspection, inspect
from .presets import gradual_preset
from .prune import prune
from .quadrature import GaussLegendre, Geometric
from .records import Curve, GroupRecord, LatencyChange, RoundRecord, WeightRecord
from .removal.plan import Plan
from .result import PruneResult
from .score import score
from .sparse import SparseResult
from .storage.onnx import export_onnx
from .storage.saved import load, load_plan
from .tensorboard import TensorBoard
from .timing.latency import Latency, latencies, latency
from .torch_pruning import SingeImportance
from .training.accuracy import accuracy
from .training.finetune import FineTune
from .version import __version__

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
    "__version__",
    "accuracy",
    "criteria",
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
