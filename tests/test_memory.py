from types import SimpleNamespace

import pytest
import torch
from torch import nn
from wiring import normal

import singe
from singe.memory import Memory, limit

SHORT = torch.OutOfMemoryError("no room")


def test_passes_take_what_they_are_given_or_a_share_that_does_not_change(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: {device: SimpleNamespace(total_memory=1 << 35)}[d]
    )
    assert limit(None, device) == 1 << 31 and limit(None, torch.device("cpu")) == 1 << 30
    assert limit(7, device) == limit(7, torch.device("cpu")) == 7
    with pytest.raises(ValueError, match="expected memory >= 1, got 0"):
        limit(0, device)


def test_work_is_done_anew_with_half_as_much_until_there_is_room(caplog):
    memory, tried = Memory("a layer", 1000, torch.device("cpu")), []

    def work():
        tried.append(memory.size)
        if memory.size > 300:
            raise SHORT
        return "done"

    assert memory.run(work, lambda: tried.append(f"anew {memory.size}")) == "done"
    assert tried == [1000, "anew 500", 500, "anew 250", 250] and memory.size == 250
    assert caplog.messages[-1] == "a layer: out of memory, passes may take 250 bytes from now on"
    tried.clear()
    assert memory.run(work) == "done" and tried == [250]


@pytest.mark.parametrize("error", [SHORT, RuntimeError("a kernel failed")])
def test_what_half_as_much_does_not_help_is_raised(error):
    memory = Memory("a layer", 2, torch.device("cpu"))

    def work():
        raise error

    with pytest.raises(type(error), match=str(error)):
        memory.run(work)
    assert memory.size == (1 if error is SHORT else 2)


class Short(nn.Module):
    """Has no room in one situation."""

    def __init__(self, when):
        super().__init__()
        self.a, self.b, self.when = nn.Linear(6, 8), nn.Linear(8, 3), when

    def forward(self, x):
        y = self.a(x).relu()
        if self.when(self, y):
            raise SHORT
        return self.b(y)


SITUATIONS = {
    "whenever it runs": lambda model, y: True,
    "in higher precision": lambda model, y: y.dtype is torch.float64,
    "where it is exported": lambda model, y: torch.compiler.is_exporting(),
    "where it is pruned": lambda model, y: y.shape[1] < 8,
    "where it is trained": lambda model, y: model.training and not torch.compiler.is_exporting() and y.shape[1] == 8,
}


@pytest.mark.parametrize("when", SITUATIONS.values(), ids=SITUATIONS.keys())
def test_a_shortage_is_never_taken_for_a_fault_of_the_network(when):
    batch = normal(8, 6), torch.arange(8) % 3
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        singe.prune(Short(when), [batch], 0.3, images=8, compensation_images=8, progress=False)
