import re
import sys
from pathlib import Path

import pytest
import resources
from resources import ARCHITECTURES, FLAGS, Usage, parse, readable, table

ROOT = Path(__file__).parents[1]
REPORT = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN5singe47_GLOBAL__N__2351a52e_4_s_cu_10tile_normsIddLi1EEEvPKT_' for 'sm_80'
ptxas info    : Function properties for _ZN5singe47_GLOBAL__N__2351a52e_4_s_cu_10tile_normsIddLi1EEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 4608 bytes smem, 648 bytes cmem[0]
ptxas info    : Compile time = 912.110 ms
ptxas info    : Compiling entry function '_Z5spillPKfPf' for 'sm_90'
ptxas info    : Function properties for _Z5spillPKfPf
    64 bytes stack frame, 56 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 64 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compile time = 33.614 ms
ptxas info    : Compiling entry function '_Z5spillPKfPf' for 'sm_80'
ptxas info    : Function properties for _Z5spillPKfPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 368 bytes cmem[0]
"""


def test_parse():
    tile, *spill = parse(REPORT)
    assert tile.kernel.endswith("10tile_normsIddLi1EEEvPKT_")
    assert (tile.architecture, tile.registers, tile.shared, tile.stack, tile.spills) == ("80", 128, 4608, 0, 0)
    assert spill == [Usage("_Z5spillPKfPf", "90", 32, 0, 64, 108), Usage("_Z5spillPKfPf", "80", 40)]


def test_faults():
    tile, spill, _ = parse(REPORT)
    assert tile.faults(threads=256) == []
    assert tile.faults(threads=1024) == ["needs 131072 registers a block"]
    assert spill.faults(threads=256) == ["spills 108 bytes", "has 64 bytes of stack"]
    assert Usage("k", "80", shared=50_000).faults(threads=32) == ["needs 50000 bytes of shared memory"]


def test_table_has_a_line_for_every_kernel():
    head, *lines = table(parse(REPORT)).splitlines()
    assert head.split() == ["registers", "on", "sm_80", "sm_90", "shared", "stack", "spills"]
    assert [line.split()[1:] for line in lines] == [["40", "32", "0", "64", "108"], ["128", "4608", "0", "0"]]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        (
            "void singe::(anonymous namespace)::pack<c10::Half, unsigned int>(c10::Half const*, singe::Geometry)",
            "pack<Half, unsigned int>",
        ),
        ("singe::_GLOBAL__N__1_2_s_cu_3::add_scores(double const*)", "add_scores"),
    ],
)
def test_readable(demangled, name):
    assert readable(demangled) == name


def test_compiles_as_the_build_does():
    cmake, setup = (ROOT / "CMakeLists.txt").read_text(), (ROOT / "setup.py").read_text()
    assert all(flag.removeprefix("-D") in cmake for flag in FLAGS if flag != "-std=c++20")
    assert "CUDA_STANDARD 20" in cmake
    assert tuple(re.findall(r"\d\d", re.search(r"DEFAULT_ARCHITECTURES = .*?\"(.*?)\"", setup)[1])) == ARCHITECTURES


def test_without_nvcc_says_so(monkeypatch, capsys):
    monkeypatch.setattr(resources, "find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["resources.py"])
    assert resources.main() == 1
    assert "nvcc was not found" in capsys.readouterr().err


KERNELS = """
namespace {
__global__ void copy(const int* from, int* to) { to[threadIdx.x] = from[threadIdx.x]; }
__global__ void look_up(const int* from, int* to) {
  int table[64];
  for (int i = 0; i < 64; ++i) table[i ^ from[i] & 63] = i;
  to[threadIdx.x] = table[from[threadIdx.x] & 63];
}
}
void run(const int* from, int* to) { copy<<<1, 32>>>(from, to), look_up<<<1, 32>>>(from, to); }
"""
needs_nvcc = pytest.mark.skipif(resources.find_nvcc() is None, reason="no nvcc")


@needs_nvcc
def test_stack_is_found(tmp_path, monkeypatch, capfd):
    source = tmp_path / "kernels.cu"
    source.write_text(KERNELS)
    monkeypatch.setattr(sys, "argv", ["resources.py", str(source), "--arch", "90"])
    assert resources.main() == 1
    out, err = capfd.readouterr()
    assert "kernels: copy" in out and "kernels: look_up" in out
    assert err == "kernels: look_up on sm_90 has 256 bytes of stack\n"


@needs_nvcc
def test_a_warning_fails(tmp_path, monkeypatch, capfd):
    source = tmp_path / "kernels.cu"
    source.write_text("int unused() { int value; return 0; }")
    monkeypatch.setattr(sys, "argv", ["resources.py", str(source), "--arch", "90"])
    assert resources.main() == 1
    assert "never referenced" in capfd.readouterr().err
