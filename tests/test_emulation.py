"""The CUDA kernels on the CPU, under AddressSanitizer and UndefinedBehaviorSanitizer; see csrc/README.md."""

import subprocess
import sys
from pathlib import Path

import pytest
from emulation import build

OBSTACLE = build.obstacle()
pytestmark = pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))

TESTS = Path(__file__).parent
# What gets to no kernel, what only_emulated.py has instead, and what test_neuron_grad_norm_strides shows in less time.
LEFT_OUT = "opcheck or refuses or (checked_too and remove_neurons) or deterministic or depend_on_threads"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return build.broken(tmp_path_factory.mktemp("broken"))


def run_broken(program, kernel, grid="blocks"):
    done = subprocess.run([program, kernel, grid], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_right_kernel_passes(broken):
    assert run_broken(broken, "add") == (0, "no error, sum 1001\n")


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("leave before a barrier", "from thread 7 ended; from thread 8 at the barrier"),
        ("read across a piece", "misaligned address"),
        ("read behind", "heap-buffer-overflow"),
        ("shuffle without a lane", "from thread 9 ended; from thread 10 at the shuffle"),
        ("trap", "a thread trapped"),
        ("wait at two barriers", "threads wait for others that don't come"),
        ("write behind shared memory", "insufficient space for an object of type 'float'"),
    ],
)
def test_a_wrong_kernel_is_reported(broken, kernel, message):
    code, output = run_broken(broken, kernel)
    assert code != 0 and message in output


def test_a_missing_barrier_shows_in_the_result(broken):
    code, output = run_broken(broken, "add without a barrier")
    assert code == 0 and output != "no error, sum 1001\n"


def test_a_grid_that_no_device_takes_is_refused(broken):
    assert run_broken(broken, "add", "no blocks") == (0, "invalid configuration argument, sum 0\n")


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    return build.operators(tmp_path_factory.mktemp("operators"))


def run_tests(files, chosen, **libraries):
    """Runs tests on the emulated operators."""
    arguments = ["-p", "emulated", "-p", "no:cacheprovider", "-q", "--capture=sys", "-k", chosen]
    command = [sys.executable, "-m", "pytest", *arguments, *files]
    environment = build.environment() | {name: str(path) for name, path in libraries.items()}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr)[-10_000:]


def test_operators(operators, tmp_path):
    """Those of test_ops.py that reach a kernel, and what only the emulation can be asked."""
    files = [TESTS / "test_ops.py", TESTS / "emulation" / "only_emulated.py"]
    libraries = {"SINGE_EMULATED": operators, "SINGE_EMULATED_TORCH": build.torch_cuda(tmp_path)}
    code, output = run_tests(files, f"not ({LEFT_OUT})", **libraries)
    assert code == 0, output


def test_where_torch_has_no_cuda_library_operators_say_so(operators):
    code, output = run_tests([TESTS / "emulation" / "only_emulated.py"], "", SINGE_EMULATED=operators)
    assert code == 1 and "this torch has no CUDA" in output
