"""Which singe this is, and what it runs on."""

from __future__ import annotations

import platform

import torch

__version__ = "0.1.0"


def surroundings(device: torch.device) -> dict[str, str]:
    """Versions, and what a model on a device runs on, by name."""
    processor = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "singe": __version__,
        "torch": torch.__version__,
        "device": f"{processor}, {torch.get_num_threads()} threads" if device.type == "cpu" else accelerator,
    }
