import logging

import pytest
import torch
from networks import MLP, randomised
from states import same
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from wiring import Wired, normal

import singe
from singe.models.isolation import plain_torch
from singe.models.wrappers import unwrapped
from singe.removal.plan import Plan
from singe.sizes import count_macs, count_parameters

X, Y = normal(20, 10), torch.arange(20) % 4
BATCH = (X, Y)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """DistributedDataParallel in a group of one process."""
    path = tmp_path_factory.mktemp("group") / "init"
    torch.distributed.init_process_group("gloo", init_method=path.as_uri(), rank=0, world_size=1)
    yield DistributedDataParallel
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "data parallel": lambda model, ddp: nn.DataParallel(model),
    "distributed": lambda model, ddp: ddp(model),
    "compiled": lambda model, ddp: compiled(model),
    "compiled and distributed": lambda model, ddp: compiled(ddp(model)),
    "distributed and compiled": lambda model, ddp: ddp(compiled(model)),
}


def prune(model, **options):
    plain = {"allocation": "uniform", "compensate": "none", "images": 20, "progress": False}
    options = {**plain, "finetune": None, "criterion": "magnitude", **options}
    return singe.prune(model, [BATCH], 0.3, **options)


@pytest.fixture(scope="module")
def unwrapped_model():
    """A model as it is: pruned, and with scores of its first layer."""
    model = randomised(MLP())
    return model, prune(model, ignore=["layers.2"]), singe.score(model, BATCH, "layers.0")


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_every_function_takes_the_module_inside(wrap, distributed, unwrapped_model, tmp_path, caplog):
    (plain, expected, scores), inner = unwrapped_model, randomised(MLP())
    wrapped = wrap(inner, distributed)
    assert unwrapped(wrapped) is inner and unwrapped(inner) is inner
    with caplog.at_level(logging.INFO, "singe"):
        result = prune(wrapped, ignore=["layers.2"])
    assert f"taking the module inside of {type(wrapped).__name__}" in [r.getMessage() for r in caplog.records]
    assert type(result.model) is MLP and result.plan == expected.plan and result.frozen == expected.frozen
    assert same(inner.state_dict(), plain.state_dict())
    arguments = BATCH, "layers.0"
    assert torch.equal(singe.score(wrapped, *arguments), scores)
    literal = (singe.reference.score(m, *arguments, criterion="magnitude") for m in (wrapped, plain))
    assert torch.equal(*literal)
    assert type(singe.fold_batchnorm(wrapped, X).model) is MLP
    result.save(tmp_path)
    loaded = singe.load(wrapped, tmp_path)
    assert type(loaded) is MLP and same(loaded.state_dict(), result.model.state_dict())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    assert result.plan.apply(wrapped, optimizer) is inner
    assert [p.shape for p in inner.parameters()] == [p.shape for p in result.model.parameters()]
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], inner.parameters(), strict=True))


def test_names_as_in_the_wrapper_are_refused_with_those_inside():
    wrapped = nn.DataParallel(randomised(MLP()))
    with pytest.raises(ValueError, match=r"ignore, got 'module\.layers\.0' .*perhaps 'layers\.0'"):
        prune(wrapped, ignore=["module.layers.0"])
    with pytest.raises(ValueError, match=r"of MLP, got '_orig_mod\.module\.layers\.0' .*perhaps 'layers\.0'"):
        singe.score(wrapped, BATCH, "_orig_mod.module.layers.0")
    with pytest.raises(ValueError, match=r"got 'modules'$"):
        prune(wrapped, ignore=["modules"])


@pytest.mark.parametrize(("model", "kind"), [(MLP, "type"), (lambda x: x, "function"), (None, "NoneType")])
def test_what_is_no_module_is_refused(model, kind):
    for use in (unwrapped, prune, Plan().apply):
        with pytest.raises(TypeError, match=rf"torch\.nn\.Module, got {kind}"):
            use(model)


# -- compiled in place and inside ----------------------------------------------------------------------------------


class Counted:
    """A backend that compiles nothing and counts how often it is asked to."""

    def __init__(self):
        self.compilations = 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, graph, inputs):
        self.compilations += 1
        return graph.forward


def nested():
    """A network of one's own class inside of another."""
    return Wired(lambda self, x: self.head(self.body(x).relu()), body=MLP(), head=nn.Linear(4, 4))


@pytest.mark.parametrize("part", ["", "body"])
def test_a_model_compiled_in_place_is_pruned_as_it_is(part):
    model, plain, backend = nested(), nested(), Counted()
    model.get_submodule(part).compile(backend=backend)
    with torch.no_grad():
        expected = model(X)
    before = backend.compilations
    assert before > 0
    result = prune(model)
    assert result.plan == prune(plain).plan and backend.compilations == before
    with torch.no_grad():
        assert torch.equal(model(X), expected)
        result.plan.apply(model)  # the compiled code follows the new shapes
        assert torch.allclose(model(X), result.model(X), atol=1e-6)


@pytest.mark.filterwarnings("error:Using `torch.compile")
def test_submodules_that_are_compiled_run_uncompiled_while_copies_are_worked_on():
    model, plain, backend = nested(), nested(), Counted()
    model.body = torch.compile(model.body, backend=backend)
    result, expected = prune(model), prune(plain)
    assert backend.compilations == 0
    assert [r.group for r in result.plan.removals] == [f"body._orig_mod.layers.{i}" for i in (0, 2, 4)]
    assert [r.neurons for r in result.plan.removals] == [r.neurons for r in expected.plan.removals]
    assert result.macs_after == expected.macs_after == count_macs(expected.model, X)
    with torch.no_grad():
        assert torch.allclose(result.model(X), expected.model(X), atol=1e-6)
    assert backend.compilations > 0  # the result is compiled where the model was


def test_the_compilers_stance_is_given_back_also_after_an_exception():
    backend = Counted()
    function = torch.compile(lambda x: x + 1, backend=backend)
    with pytest.raises(KeyError), plain_torch(torch.device("cpu")):
        function(X)
        raise KeyError
    assert backend.compilations == 0
    function(X)
    assert backend.compilations == 1


def test_torchscript_is_refused_by_its_name():
    scripted = torch.jit.trace(nn.Linear(3, 2), torch.rand(1, 3))
    with pytest.raises(TypeError, match=r"expected the torch\.nn\.Module that TorchScript was made from, got TopLevel"):
        unwrapped(scripted)


def test_the_network_inside_of_an_averaged_one_is_taken():
    average, expected = AveragedModel(nested()), prune(nested())
    average.update_parameters(nested())
    result = prune(average)
    assert result.plan == expected.plan and type(result.model) is type(expected.model)
    assert expected.plan.apply(average) is average.module
    assert count_parameters(average.module) == expected.params_after
