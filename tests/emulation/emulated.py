"""A pytest plugin: torch.ops.singe are the CUDA kernels, emulated, instead of the operators of singe._C."""

import os
import sys
import types

import torch

torch.ops.load_library(os.environ["SINGE_EMULATED"])
sys.modules["singe._C"] = types.ModuleType("singe._C")
