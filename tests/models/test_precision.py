import threading

import pytest
import torch
from networks import DigitNet, MobileNet, images, randomised
from torch import nn

import singe
from singe.models.precision import (
    arithmetic,
    callers_multiplication,
    check_precision,
    exact_multiplication,
    prefers_channels_last,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def spearman(a, b):
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_what_is_no_precision_is_refused():
    for precision in ("float16", "fp32", None, torch.float32):
        with pytest.raises(ValueError, match="expected precision 'float32', 'tf32' or 'bfloat16', got"):
            check_precision(precision, DigitNet(3), GPU)
    with pytest.raises(ValueError, match="expected precision 'tf32' with a model on a CUDA device, got one on cpu"):
        check_precision("tf32", DigitNet(3), CPU)
    check_precision("tf32", DigitNet(3), GPU)
    with pytest.raises(ValueError, match="with a model in float32, got one in float16"):
        check_precision("bfloat16", DigitNet(3).half(), CPU)


def test_prune_and_score_refuse_it_before_any_work():
    def loader():
        raise AssertionError("work began")
        yield

    with pytest.raises(ValueError, match="expected precision"):
        singe.prune(DigitNet(3), loader(), 0.5, precision="half")
    with pytest.raises(ValueError, match="tf32"):
        singe.score(DigitNet(3), images(channels=1), "stem", precision="tf32")


BACKENDS = torch.backends


def settings():
    """How float32 values are multiplied, by torch's older settings and by its newer ones."""
    newer = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
    newer += [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn]
    older = [torch.get_float32_matmul_precision, lambda: BACKENDS.cuda.matmul.allow_tf32]
    found = []
    for read in (*older, lambda: BACKENDS.cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:  # contradicts a newer one
            found.append("contradiction")
    return found + [of.fp32_precision for of in newer]


@pytest.fixture(params=["untouched", "fast", "exact", "contradiction"])
def callers(request):
    """Settings of a caller's; torch's own come back afterwards."""
    matmul, conv = BACKENDS.cuda.matmul.fp32_precision, BACKENDS.cudnn.conv.fp32_precision
    if request.param == "fast":
        torch.set_float32_matmul_precision("medium")
    elif request.param == "exact":
        BACKENDS.cudnn.allow_tf32 = False
    elif request.param == "contradiction":
        BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cuda.matmul.fp32_precision = "ieee", "tf32"
    yield settings()
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cuda.matmul.fp32_precision, BACKENDS.cudnn.conv.fp32_precision = matmul, conv
    BACKENDS.mkldnn.matmul.fp32_precision = "none"


def test_what_the_caller_had_set_comes_back_also_after_an_error(callers):
    with pytest.raises(KeyError), arithmetic("tf32", GPU):
        assert settings()[3:6] == ["tf32"] * 3
        raise KeyError
    assert settings() == callers
    with arithmetic("float32", GPU):
        assert "tf32" not in settings()[3:6]
    assert settings() == callers
    with arithmetic("float32", CPU):
        assert "bf16" not in settings()[6:]
    assert settings() == callers
    with arithmetic("bfloat16", CPU):
        assert torch.is_autocast_enabled("cpu")
    assert settings() == callers and not torch.is_autocast_enabled("cpu")


def test_on_cuda_convolutions_repeat(monkeypatch):
    cudnn = torch.backends.cudnn
    for value in (True, False):
        monkeypatch.setattr(cudnn, "benchmark", value)
        monkeypatch.setattr(cudnn, "deterministic", not value)
        with pytest.raises(KeyError), arithmetic("float32", GPU):
            assert cudnn.deterministic and not cudnn.benchmark
            raise KeyError
        assert (cudnn.benchmark, cudnn.deterministic) == (value, not value)


def test_networks_are_compared_in_full_precision_and_trained_and_evaluated_as_the_caller_has_set(callers):
    seen, model = {"train": [], "eval": [], "evaluate": []}, randomised(DigitNet(3))

    def forward(network, batch):
        seen["train" if network.training else "eval"].append(settings())
        return network(batch[0])

    def evaluate(network):
        seen["evaluate"].append(settings())
        return 1.0

    tuned = singe.FineTune(steps=2, distill=0)
    arguments = {"criterion": "magnitude", "allocation": "uniform", "compensate": "none", "images": 8}
    arguments |= {"forward": forward, "evaluate": evaluate, "finetune": tuned, "progress": False}
    singe.prune(model, [images(16, channels=1)], 0.3, **arguments)
    assert settings() == callers
    assert seen["train"][-2:] == [callers] * 2 and all(found == callers for found in seen["evaluate"])
    assert seen["eval"] and not any("bf16" in found[6:] for found in seen["eval"][:3])


def test_on_cuda_nothing_is_in_tf32_and_calls_in_several_threads_leave_nothing_behind(callers):
    entered, left = threading.Event(), threading.Event()

    def other():
        with exact_multiplication(GPU):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=other)
    with exact_multiplication(GPU):
        thread.start()
        entered.wait(10)
        assert "tf32" not in settings()[3:6] and "contradiction" not in settings()
        with callers_multiplication():
            assert settings() == callers
    left.set()
    thread.join()
    assert settings() == callers


def test_what_follows_the_setting_for_all_goes_on_following_it():
    with arithmetic("bfloat16", CPU), exact_multiplication(CPU):
        pass
    before = BACKENDS.fp32_precision
    BACKENDS.fp32_precision = "tf32"
    try:
        with exact_multiplication(CPU):
            assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "tf32"
        BACKENDS.fp32_precision = "ieee"
        assert BACKENDS.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        BACKENDS.fp32_precision = before


def test_channels_are_innermost_where_that_is_fast():
    assert prefers_channels_last("float32", CPU) and prefers_channels_last("bfloat16", GPU)
    assert not prefers_channels_last("float32", GPU)


@pytest.mark.parametrize("make", [lambda: DigitNet(3), MobileNet])
def test_bfloat16_ranks_alike_and_hands_the_loss_what_the_model_would(make):
    model, seen = randomised(make()), set()
    channels = 1 if isinstance(model, DigitNet) else 3
    layer = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d))

    def loss(outputs, batch):
        seen.add((outputs.dtype, outputs.is_contiguous(), torch.is_autocast_enabled("cpu")))
        return torch.nn.functional.cross_entropy(outputs, batch[1])

    batch = images(16, channels=channels)
    full = singe.score(model, batch, layer, loss=loss)
    half = singe.score(model, batch, layer, loss=loss, precision="bfloat16")
    assert seen == {(torch.float32, True, False)}
    assert not torch.equal(full, half)
    assert spearman(full, half) > 0.9
    torch.testing.assert_close(half, full, rtol=0.2, atol=float(full.max()) * 0.05)


def test_a_run_in_bfloat16_prunes_as_much():
    model, data = randomised(DigitNet(3)), [images(16, channels=1)]
    result = singe.prune(model, data, 0.4, finetune=None, images=16, precision="bfloat16", progress=False)
    assert result.params_after / result.params_before == pytest.approx(0.6, abs=0.03)
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
