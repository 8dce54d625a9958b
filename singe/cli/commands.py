"""What each command does; results are printed, progress and warnings go to stderr."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import demo as demonstration
from .. import info as installed
from ..forecast import forecast
from ..inspection import inspect as look
from ..models.batches import Batch, head, with_dicts
from ..prune import prune as run
from ..report import write_report
from ..storage.files import create_directory, replace
from ..storage.onnx import export_onnx
from ..storage.saved import check as check_savable
from ..storage.saved import load as load_saved
from ..tensorboard import TensorBoard
from ..timing.stopwatch import duration
from ..training.accuracy import accuracy
from . import config, datasets, models
from .arguments import prune_arguments
from .references import find

RUN_FILE = "run.toml"

_NOT_KEPT = ("command", "config", "out", "checkpoint", "tensorboard", "dry_run", "progress", "traceback")
"""What run.toml leaves out: where a run writes its files, and how it is shown."""

SAMPLES = 4
"""Samples of the first batch to analyse a network with."""


def prune(options: argparse.Namespace) -> None:
    """Prunes, saves, and prints a summary."""
    arguments = prune_arguments(options)
    if options.out is None and not options.dry_run:
        raise ValueError("expected --out DIR for the result, or --dry-run, got neither")
    torch.manual_seed(options.seed or 0)  # for factories: resuming from a checkpoint needs the same weights
    model, data = _model(options), _data(options)
    check_savable(model)
    if data.test is not None and "evaluate" not in arguments:
        if "forward" in arguments:
            raise ValueError("expected --evaluate REF beside --forward, to measure on test data, got none")
        arguments["evaluate"] = _accuracy(model, data.test, options.test_images)
    if options.dry_run:
        if _first():
            print(forecast(model, data.train, options.rho, **arguments))
        return
    start = time.perf_counter()
    with _made(options.out), _processes(), _board(options) as callbacks:
        result = run(model, data.train, options.rho, callbacks=callbacks, **arguments)
    if not _first():
        return
    seconds = time.perf_counter() - start
    result.save(options.out)
    _leave_settings(options)
    print(result)
    print(f"pruned in {duration(seconds)}, saved in {options.out}")


def inspect(options: argparse.Namespace) -> None:
    """Prints what of a network can be pruned."""
    given = {"analysis_seconds": options.analysis_seconds, "ignore": options.ignore, "forward": _forward(options)}
    model, example = _model(options), _example(options)
    print(look(model, example, **{name: value for name, value in given.items() if value is not None}))


def report(options: argparse.Namespace) -> None:
    """Writes the page about a run."""
    print(write_report(options.directory, options.out))


def export(options: argparse.Namespace) -> None:
    """Writes a pruned network as ONNX."""
    given = {"opset": options.opset, "dynamic_batch": options.dynamic_batch, "forward": _forward(options)}
    model, example = load_saved(_model(options), options.directory), _example(options)
    print(export_onnx(model, example, options.onnx, **{name: v for name, v in given.items() if v is not None}))


def demo(options: argparse.Namespace) -> None:
    """Runs the demo."""
    demonstration.run(print)


def info(options: argparse.Namespace) -> None:
    """Prints what is installed."""
    installed.main()


# -- what commands share ---------------------------------------------------------------------------------------


def _model(options: argparse.Namespace) -> nn.Module:
    """The unpruned model, with the weights that were named, on its device."""
    model = models.make(options.model)
    if getattr(options, "weights", None) is not None:
        models.fill(model, options.weights)
    return model.to(_device(options))


def _device(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = f"cuda:{_place()}" if name == "cuda" else name
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"expected an available device, got {name!r}: {error}") from error
    return device


def _data(options: argparse.Namespace) -> datasets.Data:
    said = datasets.Settings(options.batch_size, options.workers, options.image_size)
    return datasets.load(options.data, said, _device(options))


def _accuracy(model: nn.Module, test: Iterable[Any], images: int | None) -> Callable[[nn.Module], float]:
    """A function that measures accuracy on all or the first test data; refused before work if there is none."""
    data = test if images is None else datasets.First(test, images)
    try:
        accuracy(model, datasets.First(data, 1))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; pass --evaluate REF") from error
    return lambda network: accuracy(network, data)


def _first() -> bool:
    """Whether this process, among those that torchrun may have launched, is the one that prints."""
    return int(os.environ.get("RANK", 0)) == 0


def _place() -> int:
    """Which of this machine's processes this one is."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Makes a directory before work starts, so that one that cannot be is refused; a call that fails leaves none."""
    new = not directory.exists()
    if _first():
        create_directory(directory)
    try:
        yield
    except BaseException:
        if _first() and new and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        raise


@contextmanager
def _processes() -> Iterator[None]:
    """Joins the other processes that torchrun has launched, if it has."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(_place())
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _board(options: argparse.Namespace) -> Iterator[list[Any]]:
    """The callbacks of a run."""
    if options.tensorboard is None or not _first():
        yield []
        return
    with TensorBoard(options.tensorboard) as board:
        yield [board]


def _example(options: argparse.Namespace) -> Batch:
    """Inputs to analyse a network with: random ones of a shape, or the first batch of the data."""
    if options.example is not None:
        torch.manual_seed(0)
        return torch.randn(options.example)
    if options.data is None:
        raise ValueError("expected --example SHAPE or --data REF to run the network on, got neither")
    batch = next(iter(_data(options).train), None)
    if batch is None:
        raise ValueError(f"expected at least one batch from {options.data}, got none")
    if options.forward is None and isinstance(batch, (tuple, list)):
        batch = batch[0]
    return head(with_dicts(batch), SAMPLES)


def _forward(options: argparse.Namespace) -> Any:
    return None if options.forward is None else find(options.forward)


def _leave_settings(options: argparse.Namespace) -> None:
    """Writes the options beside the result, so that ``--config`` can read them again."""
    values = {name: value for name, value in vars(options).items() if value is not None and name not in _NOT_KEPT}
    said = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    replace(options.out / RUN_FILE, lambda part: part.write_text(config.written(said), encoding="utf-8"))


RUN = {"prune": prune, "inspect": inspect, "report": report, "export": export, "demo": demo, "info": info}
"""What each command runs."""
