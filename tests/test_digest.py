import pytest
import torch

from singe.digest import digest, raw_bytes


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view], ids=["conjugated", "negated"])
def test_what_torch_conjugates_or_negates_when_it_is_read_counts_as_read(view):
    lazy = view(torch.tensor([1 + 2j, 3 - 4j]))
    assert lazy.is_conj() or lazy.is_neg()
    plain = torch.tensor(lazy.tolist(), dtype=lazy.dtype)
    assert bytes(raw_bytes(lazy)) == plain.numpy().tobytes()
    assert digest("", {"t": lazy}) == digest("", {"t": plain})
