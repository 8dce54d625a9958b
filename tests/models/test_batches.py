import pytest
import torch
from wiring import normal

from singe.models.batches import copied, described, head, joined, length, parts, tensors


def nested(count, seed=0):
    return {"x": (normal(count, 3, seed=seed), [torch.arange(count)]), "y": normal(count, seed=seed)}


def test_a_batch_is_cut_and_joined_with_its_structure():
    batch = nested(6)
    cut = [head(batch, 2), head(batch, 4)]
    assert [length(part) for part in cut] == [2, 4]
    whole = joined(cut)
    assert type(whole["x"]) is tuple and type(whole["x"][1]) is list
    assert torch.equal(whole["x"][1][0], torch.tensor([0, 1, 0, 1, 2, 3]))
    assert torch.equal(whole["y"], torch.cat([batch["y"][:2], batch["y"][:4]]))


@pytest.mark.parametrize(("count", "lengths"), [(9, [6]), (3, [3, 3]), (4, [4, 2]), (1, [1] * 6)])
def test_a_batch_passes_in_parts(count, lengths):
    batch = nested(6)
    found = list(parts(batch, count))
    assert [length(part) for part in found] == lengths
    assert torch.equal(joined(found)["x"][1][0], batch["x"][1][0])


def test_dicts_are_joined_by_key():
    one, other = nested(2), dict(reversed(nested(3, seed=1).items()))
    assert torch.equal(joined([one, other])["y"], torch.cat([one["y"], other["y"]]))


@pytest.mark.parametrize(
    "other", [(normal(2, 3), normal(2, 2)), (normal(2, 3),), [normal(2, 3), normal(2)], {"x": normal(2, 3)}, normal(2)]
)
def test_batches_of_other_structures_are_not_joined(other):
    with pytest.raises(ValueError, match=r"one shape, got samples of \(\(3,\), \(\)\) and "):
        joined([(normal(2, 3), normal(2)), other])


def test_a_copy_shares_nothing_with_the_batch():
    batch, kept = nested(4), [t.clone() for t in tensors(nested(4))]
    copy = copied(batch)
    copy["x"][1].append(torch.zeros(4))
    for tensor in tensors(copy):
        tensor.zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors(batch), kept, strict=True))


def test_a_batch_is_described_by_shapes_and_dtypes():
    assert described(nested(4)) == "{x: ((4, 3) torch.float32, [(4,) torch.int64]), y: (4,) torch.float32}"


def test_a_batch_of_many_tensors_is_described_by_the_first():
    text = described([{"boxes": normal(2, 4)} for _ in range(16)])
    assert text.startswith("[{boxes: (2, 4) torch.float32}, {boxes") and text.endswith("...") and len(text) == 203
