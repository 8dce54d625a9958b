import pytest
import torch

from singe.memory import Memory

SHORT = torch.OutOfMemoryError("no room")


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
