import inspect
from pathlib import Path

import torch

import singe
from singe import version
from singe.prune import Arguments


def test_the_package_says_that_it_is_typed():
    assert Path(singe.__file__).with_name("py.typed").is_file()


def test_the_types_of_prune_are_those_of_its_arguments():
    parameters = dict(inspect.signature(singe.prune).parameters)
    typed = {name: parameters.pop(name).annotation for name in Arguments.__annotations__}
    assert list(parameters) == ["model", "loader", "rho", "structured"]
    assert typed == {name: kind.__forward_arg__ for name, kind in Arguments.__annotations__.items()}


def test_what_a_run_says_of_where_it_ran():
    told = version.surroundings(torch.device("cpu"))
    assert (told["singe"], told["torch"]) == (singe.__version__, torch.__version__)
    assert told["device"].endswith(f"{torch.get_num_threads()} threads")
