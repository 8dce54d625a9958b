import subprocess
import sys

import torch

import singe
from singe import info, ops


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


def test_a_missing_native_module_is_reported(monkeypatch):
    monkeypatch.delitem(sys.modules, "singe.ops")
    monkeypatch.delattr(singe, "ops", raising=False)
    monkeypatch.delattr(singe, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "singe._C", None)
    assert "pip install" in info.info()["native module"]


def test_importing_starts_no_cuda_context():
    code = "import singe, singe.ops, singe.info, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
