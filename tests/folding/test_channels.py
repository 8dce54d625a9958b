import torch

from singe.folding.channels import ZERO, Channels


def groups(labels, channels):
    """Which of ``channels`` share a label, as a set of sets."""
    found = {}
    for channel in channels.tolist():
        found.setdefault(int(labels[channel]), set()).add(channel)
    return {frozenset(group) for group in found.values()}


def test_what_lies_along_other_axes_is_one_channel():
    channels = Channels()
    ids = channels.issue(6)
    x = torch.stack([ids[:3], ids[3:]], 1)[None]  # [1, 3, 2]
    assert torch.equal(channels.along(x, 1), ids[3:])
    classes = channels.classes()
    assert groups(classes.scale, ids) == groups(classes.shift, ids) == {frozenset(p) for p in ((1, 4), (2, 5), (3, 6))}


def test_zeros_keep_a_channel_from_being_shifted_only():
    channels = Channels()
    ids = channels.issue(2)
    assert torch.equal(channels.along(torch.stack([ids, torch.tensor([ZERO, int(ids[1])])]), 1), ids)
    _, found = channels.obstacles
    assert found.channels.tolist() == ids[:1].tolist() and found.shift_only


def test_sums_tie_scales_and_relate_shifts():
    channels = Channels()
    a, b = channels.issue(2), channels.issue(2)
    total = channels.weighted_sum(a.expand(4, 2), b.expand(4, 2), 2, -3)
    assert total.shape == (4, 2) and total.stride(0) == 0
    classes = channels.classes()
    everything = torch.cat([a, b, total[0]])
    triples = [frozenset(t) for t in zip(a.tolist(), b.tolist(), total[0].tolist(), strict=True)]
    assert groups(classes.scale, everything) == set(triples)
    assert len(groups(classes.shift, everything)) == 6
    assert classes.terms.tolist() == [[int(t), int(x), int(y)] for t, x, y in zip(total[0], a, b, strict=True)]
    assert classes.coefficients.tolist() == [[-1, 2, -3]] * 2


def test_a_sum_with_itself_has_one_term():
    channels = Channels()
    a = channels.issue(1)
    channels.weighted_sum(a, a, 1, 2)
    assert channels.classes().coefficients.tolist() == [[-1, 3, 0]]


def test_zeros_plus_zeros_are_zeros():
    channels = Channels()
    nothing = torch.tensor([ZERO])
    assert torch.equal(channels.weighted_sum(nothing, nothing, 1, 1), nothing)
