import platform
import subprocess
import sys

import torch

import singe
from singe import info, ops


def test_the_module_runs_without_a_warning():
    done = subprocess.run([sys.executable, "-W", "error", "-m", "singe.info"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("singe")


def test_info_names_versions_and_build():
    lines = info.info()
    assert lines["singe"] == singe.__version__
    assert lines["torch"] == torch.__version__
    assert ops.build_info()["torch"] in lines["native module"]
    assert all(isinstance(value, str) and value for value in lines.values())


def test_main_prints_every_line(capsys):
    info.main()
    printed = capsys.readouterr().out
    assert all(name in printed and value in printed for name, value in info.info().items())


def test_a_missing_native_module_is_reported_with_all_versions():
    code = "import sys; sys.modules['singe._C'] = None; import singe.info"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "run `pip install .` in the source directory" in done.stderr
    assert f"Python {platform.python_version()} with torch {torch.__version__}" in done.stderr


def test_importing_starts_no_cuda_context_reaches_no_network_and_prints_nothing():
    code = """if True:
        import socket

        class Refused(socket.socket):
            def __init__(self, *_, **__):
                raise AssertionError("the network was reached for")

        socket.socket, socket.getaddrinfo = Refused, Refused
        import torch
        before = torch.get_rng_state()
        import singe, singe.demo, singe.info, singe.ops
        assert not torch.cuda.is_initialized()
        assert torch.equal(torch.get_rng_state(), before)
    """
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stdout == done.stderr == b""
