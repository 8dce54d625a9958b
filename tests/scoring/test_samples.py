import pytest
import torch
from torch import nn

from singe.graph.trace import trace
from singe.scoring.samples import Samples
from singe.scoring.stacking import Stacking

X = torch.arange(12.0).reshape(4, 3)


def samples(coarse=False):
    graph = trace(nn.Linear(3, 2), X)
    return Samples("group", graph, Stacking(graph), coarse)


def faded(change=lambda stack: stack):
    """The outputs of jobs that scale four samples by t, each in a stack that ``change`` is done to."""
    return lambda jobs: [change(torch.cat([t * X for t in jobs.t.tolist()]))]


def some(change=lambda part: part):
    return lambda start, size: [change(X[start : start + size])]


def test_samples_that_do_not_see_each_other_stack_and_part():
    assert samples().stack(faded()) and samples().part(some())


def test_a_number_of_outputs_that_two_jobs_cannot_share_is_no_stack():
    assert not samples().stack(faded(lambda stack: stack[:7]))


def test_those_that_do_neither_stack_nor_part():
    assert not samples().stack(faded(lambda stack: stack - stack.mean(0)))
    assert not samples().part(some(lambda part: part - part.mean(0)))


def test_less_than_single_precision_is_compared_as_such():
    def rounded(stack):
        return stack + 1e-3 * (len(stack) == 8)

    assert samples(coarse=True).stack(faded(rounded)) and not samples().stack(faded(rounded))


def test_what_fails_for_another_number_of_samples_is_not_done():
    def picky(part):
        if len(part) not in (2, 4):
            raise ValueError("of no use")
        return part

    assert not samples().stack(faded(picky)) and not samples().part(some(picky))


def test_a_lack_of_room_is_not_taken_for_an_answer():
    def full(part):
        if len(part) in (1, 8):
            raise MemoryError("all is full")
        return part

    with pytest.raises(MemoryError, match="all is full"):
        samples().stack(faded(full))
    with pytest.raises(MemoryError, match="all is full"):
        samples().part(some(full))
