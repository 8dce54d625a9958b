"""A pytest plugin: torch.ops.singe are the CUDA kernels, emulated, instead of the operators of singe._C."""

import ctypes
import os
import sys
import types

import torch

if "SINGE_EMULATED_TORCH" in os.environ:
    ctypes.CDLL(os.environ["SINGE_EMULATED_TORCH"])  # its symbols are seen by nobody else, as those of torch's own
torch.ops.load_library(os.environ["SINGE_EMULATED"])
sys.modules["singe._C"] = types.ModuleType("singe._C")
