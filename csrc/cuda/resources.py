#!/usr/bin/env python3
"""What every CUDA kernel needs on every architecture: registers, shared memory, stack and spills.

Compiles csrc/cuda/*.cu with every warning an error and prints ptxas's report as a table; fails where a kernel keeps
something in local memory or a block of it would not fit. Needs nvcc and torch's headers, but no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "86", "89", "90")
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-DTORCH_TARGET_VERSION=0x020b000000000000")
STRICT = ("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror", "-Xptxas=-v,-Werror")
REGISTERS, SHARED = 64 << 10, 48 << 10  # that a block can have: 32-bit registers, static bytes

ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'")
LOCAL = re.compile(r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill")
USED = re.compile(r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?")


@dataclass
class Usage:
    """What one kernel needs on one architecture; all but the registers in bytes."""

    kernel: str
    architecture: str
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0

    def faults(self, threads: int) -> list[str]:
        """What is wrong with it in blocks of ``threads`` threads."""
        found = {
            f"spills {self.spills} bytes": self.spills,
            f"has {self.stack} bytes of stack": self.stack,
            f"needs {self.registers * threads} registers a block": self.registers * threads > REGISTERS,
            f"needs {self.shared} bytes of shared memory": self.shared > SHARED,
        }
        return [fault for fault, wrong in found.items() if wrong]


def parse(report: str) -> list[Usage]:
    """Every kernel in what ``ptxas -v`` says, with its mangled name."""
    usages: list[Usage] = []
    for line in report.splitlines():
        if match := ENTRY.search(line):
            usages.append(Usage(match["name"], match["architecture"]))
        elif match := LOCAL.search(line):
            usages[-1].stack = int(match["stack"])
            usages[-1].spills = int(match["stores"]) + int(match["loads"])
        elif match := USED.search(line):
            usages[-1].registers, usages[-1].shared = int(match["registers"]), int(match["shared"] or 0)
    return usages


def readable(demangled: str) -> str:
    """A kernel's name and template arguments: no return type, namespaces or parameters."""
    name = demangled.replace("(anonymous namespace)::", "").partition("(")[0].removeprefix("void ")
    return re.sub(r"\b\w+::", "", name)


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable names of mangled ones."""
    names = list(dict.fromkeys(names))
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, map(readable, text.splitlines()), strict=True))


def table(usages: Iterable[Usage]) -> str:
    """A line for every kernel, with its registers on each architecture and the most it needs of all else."""
    kernels: dict[str, list[Usage]] = {}
    for usage in usages:
        kernels.setdefault(usage.kernel, []).append(usage)
    architectures = sorted({usage.architecture for rows in kernels.values() for usage in rows})
    lines = [["registers on", *(f"sm_{a}" for a in architectures), "shared", "stack", "spills"]]
    for kernel, rows in sorted(kernels.items()):
        registers = {usage.architecture: str(usage.registers) for usage in rows}
        most = [str(max(getattr(usage, field) for usage in rows)) for field in ("shared", "stack", "spills")]
        lines.append([kernel, *(registers.get(a, "") for a in architectures), *most])
    width = max(len(line[0]) for line in lines)
    return "\n".join(line[0].ljust(width) + "".join(cell.rjust(8) for cell in line[1:]) for line in lines)


def find_nvcc() -> str | None:
    """The CUDA compiler, where setup.py looks for it."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(str(home / "bin" / "nvcc"))


def compile_report(nvcc: str, source: Path, architectures: Iterable[str]) -> str:
    """What ptxas says of a file; raises CalledProcessError at the first warning, with what it was in its stderr."""
    import torch

    include = Path(torch.__file__).resolve().parent / "include"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *STRICT, *targets, "-isystem", include, "-c", source, "-o", f"{folder}/kernels.o"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def threads_of_a_block() -> int:
    """What common.cuh starts every kernel with."""
    match = re.search(r"kThreads = (\d+)", (HERE / "common.cuh").read_text())
    assert match is not None
    return int(match[1])


def usages_of(nvcc: str, source: Path, architectures: Iterable[str]) -> list[Usage]:
    """Every kernel of a file, with a readable name."""
    usages = parse(compile_report(nvcc, source, architectures))
    names = demangle(usage.kernel for usage in usages)
    return [replace(usage, kernel=f"{source.stem}: {names[usage.kernel]}") for usage in usages]


def main() -> int:
    """Prints the table; 1 if something is wrong with a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="architectures, such as 80 90")
    parser.add_argument("sources", nargs="*", type=Path, help="default: every kernel")
    args = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        print("nvcc was not found; put it on the PATH or set CUDACXX", file=sys.stderr)
        return 1
    usages, faults, threads = [], [], threads_of_a_block()
    for source in args.sources or sorted(HERE.glob("*.cu")):
        try:
            usages += usages_of(nvcc, source, args.arch)
        except subprocess.CalledProcessError as error:
            faults.append(re.sub(r"^(ptxas info .*| {4}\d+ bytes .*)\n", "", error.stderr, flags=re.MULTILINE))
    faults += [f"{u.kernel} on sm_{u.architecture} {fault}" for u in usages for fault in u.faults(threads)]
    print(table(usages))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults or not usages else 0


if __name__ == "__main__":
    sys.exit(main())
