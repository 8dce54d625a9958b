"""Compiles the CUDA kernels for the host, on the emulated runtime beside this file and with the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
TORCH = Path(torch.__file__).resolve().parent
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
KERNEL = ["-O1", *SANITIZERS, "-xc++"]
OPERATORS = [*KERNEL, "-include", HERE / "operators.h"]
RUNTIME = ["-O2"]  # the emulation itself has to be fast


def library_path(name: str) -> str:
    """A library of the compiler's; its bare name where the compiler has none."""
    answer = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return answer.stdout.strip()


def obstacle() -> str | None:
    """Why nothing can be built here."""
    if COMPILER is None:
        return "no g++"
    if torch.version.cuda is not None:
        return "torch has a CUDA library of its own"
    if not all(Path(library_path(name)).is_absolute() for name in ("libasan.so", "libubsan.so")):
        return f"{COMPILER} has no AddressSanitizer or UndefinedBehaviorSanitizer that Python could be started with"
    return None


def build(output: Path, sources: dict[Path, list], link: list) -> Path:
    """A program or library of sources, each with the flags for it."""

    def compiled(source: Path) -> Path:
        target = output.with_name(f"{output.name}.{source.name}.o")
        includes = [f"-I{HERE}", "-isystem", TORCH / "include"]
        subprocess.run([COMPILER, *FLAGS, *sources[source], *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    subprocess.run([COMPILER, *SANITIZERS, *objects, *link, "-o", output], check=True)
    return output


def torch_cuda(folder: Path) -> Path:
    """A library in the place of torch's for CUDA."""
    name = "libtorch_cuda.so"
    return build(folder / name, {HERE / "torch_cuda.cpp": RUNTIME}, ["-shared", f"-Wl,-soname,{name}"])


def operators(folder: Path) -> Path:
    """A library that registers csrc/cuda's operators for the CPU."""
    sources = {source: OPERATORS for source in [CSRC / "library.cpp", *CSRC.glob("cuda/*.cu")]}
    sources |= {HERE / "grid.cpp": RUNTIME, HERE / "device.cpp": RUNTIME}
    link = ["-shared", "-Wl,-Bsymbolic-functions", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    return build(folder / "operators.so", sources, link)


def broken(folder: Path) -> Path:
    """A program of kernels that are wrong."""
    return build(folder / "broken", {HERE / "broken.cu": KERNEL, HERE / "grid.cpp": RUNTIME}, [])


def environment() -> dict[str, str]:
    """For a Python that loads such a library: the sanitizers have to be there first."""
    return os.environ | {
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "LD_PRELOAD": " ".join(map(library_path, ("libasan.so", "libstdc++.so"))),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, CSRC.parent))),
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
