"""Builds the native module singe._C with CMake; everything else is in pyproject.toml.

Environment:
    SINGE_CUDA            auto (default): CUDA kernels where nvcc is found; 1: they are required; 0: none.
    TORCH_CUDA_ARCH_LIST  architectures in torch's spelling, such as "8.0;9.0+PTX".
    CMAKE_CUDA_ARCHITECTURES  the same in CMake's spelling, such as "80-real;90"; it wins over the former.
    CUDACXX, CUDA_HOME    where nvcc is, when it is not on the PATH.
    SINGE_WERROR          1: the compilers' warnings are errors.
    MAX_JOBS              compilations at once.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "80-real;86-real;89-real;90"  # without -real: machine code and PTX


def find_nvcc() -> str | None:
    """The CUDA compiler: CUDACXX, the one on the PATH, or the one below CUDA_HOME."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(str(home / "bin" / "nvcc"))


def cuda_compiler() -> str | None:
    """The compiler to build the CUDA kernels with, None to leave them out."""
    wish = os.environ.get("SINGE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise ValueError(f"SINGE_CUDA must be auto, 0 or 1, got {wish!r}")
    nvcc = None if wish == "0" else find_nvcc()
    if wish == "1" and nvcc is None:
        raise RuntimeError("SINGE_CUDA=1 but nvcc was not found: put it on the PATH or set CUDACXX")
    return nvcc


def cuda_architectures() -> str:
    """CMake's list of architectures, from either variable users know."""
    if cmake_list := os.environ.get("CMAKE_CUDA_ARCHITECTURES"):
        return cmake_list
    names = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if names == [""]:
        return DEFAULT_ARCHITECTURES
    return ";".join(architecture(name) for name in names)


def architecture(name: str) -> str:
    """One entry in CMake's spelling: 8.6 -> 86-real, 9.0a+PTX -> 90a."""
    match = re.fullmatch(r"(\d+)\.(\d[a-z]?)(\+PTX)?", name)
    if match is None:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.6 or 9.0+PTX, got {name!r}")
    major, minor, ptx = match.groups()
    return f"{major}{minor}" + ("" if ptx else "-real")


class CMakeBuild(build_ext):
    """Runs CMake and Ninja, both from pip, and leaves the module beside the package."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build in build/cmake-<python>, which later builds reuse."""
        torch_dir = Path(torch.__file__).resolve().parent
        output = (Path.cwd() / self.get_ext_fullpath(ext.name)).parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "PYBIND11_INCLUDE": pybind11_include(torch_dir),
            "TORCH_DIR": torch_dir,
            "TORCH_VERSION": torch.__version__,
            "SINGE_WERROR": os.environ.get("SINGE_WERROR", "0"),
        }
        if nvcc := cuda_compiler():
            options |= {"CMAKE_CUDA_COMPILER": nvcc, "CMAKE_CUDA_ARCHITECTURES": cuda_architectures()}
        if ninja := shutil.which("ninja"):
            options["CMAKE_MAKE_PROGRAM"] = ninja
        cmake = cmake_command()
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # --fresh: an isolated build's torch and ninja are gone when the next one starts
        subprocess.check_call([*cmake, "--fresh", "-GNinja", "-S", ROOT, "-B", build, *defines])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call([*cmake, "--build", build, "--parallel", jobs])


def pybind11_include(torch_dir: Path) -> Path:
    """The headers of pybind11, from its package or, on a machine without it, the copy that torch brings."""
    try:
        import pybind11
    except ImportError:
        return torch_dir / "include"
    return Path(pybind11.get_include())


def cmake_command() -> list[str]:
    """The cmake that pip installed, whatever the system has; its own one only if pip's is absent."""
    try:
        import cmake
    except ImportError:
        return ["cmake"]
    return [str(Path(cmake.CMAKE_BIN_DIR) / "cmake")]


setup(ext_modules=[Extension("singe._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
