import torch
from networks import PlainNet, images, randomised
from torch import nn
from wiring import Attention, Wired

from singe.sizes import count_macs, count_parameters, widths


def test_parameters_count_once_however_often_they_are_used():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert count_parameters(model) == 12 + 12 + 6
    model[1].weight = model[0].weight
    assert count_parameters(model) == 12 + 3 + 6


def test_multiply_adds_are_counted_by_hand():
    model = randomised(PlainNet())
    x = images()[0]
    convolutions = 7 * 27 * 64 + 9 * 63 * 16 + 6 * 81 * 4
    assert count_macs(model, x[:1]) == convolutions + 6 * 11 + 11 * 4
    assert count_macs(model, x) == count_macs(model, x[:1])


def test_attention_is_counted_however_it_is_computed():
    torch.manual_seed(0)
    x, fast = torch.randn(2, 10, 8), torch.backends.mha.get_fastpath_enabled()
    fused, parts = Attention(True, fused=True), Attention(True, fused=False)
    assert count_macs(fused, x[..., :5]) == count_macs(parts, x[..., :5]) == 10 * (5 * 36 + 12 * 5) + 2 * 10 * 10 * 12
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()  # takes a path of its own in eval mode
    expected = 10 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 10 * 10 * 8
    assert count_macs(layer, x) == expected
    encoder, padding = nn.TransformerEncoder(layer, 2).eval(), torch.arange(10) >= torch.tensor([[10], [7]])
    assert count_macs(encoder, (x, padding), lambda m, b: m(b[0], src_key_padding_mask=b[1])) == 2 * expected
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_views_of_parameters_are_operands_like_others():
    model = Wired(
        lambda self, x: self.b(x * self.a(self.q.weight.expand(len(x), -1))), a=nn.Linear(3, 3), b=nn.Linear(3, 2)
    )
    model.q = nn.Embedding(1, 3)
    model.a.bias.requires_grad_(False)
    assert count_macs(model, torch.randn(2, 3)) == 9 + 6
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["a.bias"]
    with torch.inference_mode():
        made = nn.Linear(3, 2)
    assert count_macs(made, torch.randn(2, 3)) == 6 and made.weight.requires_grad


def test_widths_are_those_of_layers():
    before, after = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert widths(before, after) == {"0": (4, 2)}
    transposed = nn.ConvTranspose2d(3, 8, 2, groups=1)
    assert widths(transposed, transposed) == {"": (8, 8)}
