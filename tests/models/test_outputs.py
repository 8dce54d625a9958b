from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from wiring import normal

from singe.models.outputs import Form, leaves, with_paths


@dataclass
class Answer:
    logits: Tensor
    extra: object = None
    derived: int = field(init=False, default=0)

    def __post_init__(self):
        self.derived = len(self.logits)


@dataclass
class ModelOutput(OrderedDict):
    """A dict and a dataclass in one, as Hugging Face's, in which None does not count as an item."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self):
        self.update({f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None})


class Named(OrderedDict):
    def __getattr__(self, name):
        return self[name]


Pair = namedtuple("Pair", "a b")


def nested():
    return {
        "answer": Answer(normal(3, 4), [normal(3, seed=1), None]),
        "output": ModelOutput(logits=normal(3, seed=2)),
        "named": Named(x=normal(3, seed=4), y=(5, "text")),
        "user": UserDict(z=Answer(normal(3, seed=5))),
        "pair": Pair(normal(3, seed=6), defaultdict(list, c=normal(3, seed=7))),
    }


PATHS = [
    ("answer", "logits"), ("answer", "extra", "0"), ("answer", "extra", "1"), ("output", "loss"), ("output", "logits"),
    ("named", "x"), ("named", "y", "0"), ("named", "y", "1"), ("user", "z", "logits"), ("user", "z", "extra"),
    ("pair", "a"), ("pair", "b", "c"),
]  # fmt: skip


def test_what_is_held_is_found_with_the_path_to_it():
    outputs = nested()
    assert [path for path, _ in with_paths(outputs)] == PATHS
    assert leaves(outputs)[0] is outputs["answer"].logits
    assert leaves(outputs)[7] == "text"
    assert leaves(outputs)[-1] is outputs["pair"].b["c"]


def test_outputs_are_made_anew_of_other_values():
    outputs = nested()
    twice = [2 * v if isinstance(v, Tensor) else v for v in leaves(outputs)]
    made = Form(outputs).build(twice)
    assert [path for path, _ in with_paths(made)] == PATHS
    assert all(a is b for a, b in zip(leaves(made), twice, strict=True))
    assert {key: type(value) for key, value in made.items()} == {key: type(value) for key, value in outputs.items()}
    assert torch.equal(made["answer"].logits, 2 * outputs["answer"].logits) and made["answer"].derived == 3
    assert list(made["output"]) == ["logits"] and made["output"].loss is None
    assert torch.equal(made["named"].x, 2 * outputs["named"].x) and made["named"].y == (5, "text")
    assert made["pair"].b.default_factory is list


def test_a_tensor_alone_is_what_it_is():
    x = normal(2, 3)
    assert with_paths(x) == [((), x)]
    assert Form(x).build([x]) is x


def test_a_form_holds_on_to_no_tensor():
    form = Form(Answer(normal(3, 4), {"a": normal(3)}))
    seen, todo = set(), [form]
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        assert not isinstance(thing, Tensor)
        todo += thing if isinstance(thing, list) else list(getattr(thing, "__dict__", {}).values())
    assert len(seen) > 5


def test_a_class_is_no_dataclass_of_tensors():
    assert leaves([Answer, 3]) == [Answer, 3]
