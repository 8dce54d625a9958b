import pytest
import torch
from networks import DigitNet, MobileNet, images, randomised
from torch import nn

import singe
from singe.models.precision import arithmetic, check_precision, prefers_channels_last

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def spearman(a, b):
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def test_what_is_no_precision_is_refused():
    for precision in ("float16", "fp32", None, torch.float32):
        with pytest.raises(ValueError, match="expected precision 'float32', 'tf32', 'bfloat16', got"):
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


def test_what_the_caller_had_set_comes_back_also_after_an_error():
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [s.fp32_precision for s in switches]
    with pytest.raises(KeyError), arithmetic("tf32", GPU):
        assert [s.fp32_precision for s in switches] == ["tf32", "tf32"]
        raise KeyError
    assert [s.fp32_precision for s in switches] == before
    with arithmetic("float32", GPU):
        assert [s.fp32_precision for s in switches] == ["ieee", "ieee"]
    assert [s.fp32_precision for s in switches] == before
    with arithmetic("bfloat16", CPU):
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


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
