import pytest
import torch
from networks import randomised
from torch import nn
from wiring import normal

from singe.folding.absorb import absorbed
from singe.folding.channels import AffineLayer
from singe.folding.roots import Change

LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 6)),
    "linear without bias": (nn.Linear(6, 4, bias=False), (3, 6)),
    "line": (nn.Conv1d(6, 4, 3), (3, 6, 7)),
    "plane in groups": (nn.Conv2d(6, 4, (2, 3), groups=2, bias=False), (3, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (3, 6, 5, 5)),
    "volume": (nn.Conv3d(6, 4, 2), (3, 6, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(6, 4, 1, bias=False), (3, 6, 5, 5)),
    "transposed in groups": (nn.ConvTranspose1d(6, 4, 1, groups=2), (3, 6, 5)),
    "batch norm": (nn.BatchNorm2d(6), (3, 6, 5, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_changed_inputs_give_changed_outputs(case):
    module, shape = LAYERS[case]
    randomised(module.double())
    x = normal(*shape, dtype=torch.float64)
    with torch.no_grad():
        y = module(x)
    reads, writes = torch.arange(shape[1]), torch.arange(shape[1], shape[1] + y.shape[1])
    count = len(reads) + len(writes)
    scale, shift = normal(count, seed=1, dtype=torch.float64), normal(count, seed=2, dtype=torch.float64)
    change = Change(scale, shift, 1 / scale, shift / scale)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    weight, bias = absorbed(module, AffineLayer(case, None, reads, writes), change)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)

    def changed(value, channels):
        broadcast = [-1] + [1] * (value.dim() - 2)
        return value * scale[channels].view(broadcast) + shift[channels].view(broadcast)

    with torch.no_grad():
        torch.testing.assert_close(module(changed(x, reads)), changed(y, writes))


def test_a_layer_without_bias_gets_one_be_it_zero():
    one, none = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    layer = AffineLayer("", None, torch.arange(4), torch.arange(4, 8))
    weight, bias = absorbed(nn.Linear(4, 4, bias=False), layer, Change(2 * one, none, one / 2, none))
    assert bias.tolist() == [0] * 4 and weight.dtype == bias.dtype == torch.float32
