"""What is installed and how it was built, for bug reports: `python -m singe.info`."""

from __future__ import annotations

import platform

import torch

from . import ops
from .version import __version__


def info() -> dict[str, str]:
    """Versions, the native module's build, devices and threads, by name, in the order to print them."""
    return {
        "singe": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        **_build(),
        **_devices(),
        "threads": str(torch.get_num_threads()),
    }


def _build() -> dict[str, str]:
    build = ops.build_info()
    kernels = f"CUDA {build['cuda']}, architectures {build['architectures']}" if build["cuda"] else "not built"
    return {
        "native module": f"built against torch {build['torch']} with {build['compiler']}",
        "CUDA kernels": kernels,
    }


def _devices() -> dict[str, str]:
    cpu = torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available():
        return {"cpu": cpu, "cuda": f"not available (torch is for CUDA {torch.version.cuda})"}
    found = {"cpu": cpu, "cuda": f"{torch.version.cuda}, {torch.cuda.device_count()} device(s)"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{index}"] = f"{properties.name}, {properties.major}.{properties.minor}, {memory}"
    return found


def main() -> None:
    """Prints `info()`, one line each."""
    lines = info()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
