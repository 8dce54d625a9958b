"""What tests of several processes do in each of them: ``python ranked.py FOLDER SCENARIO...``, as torchrun does.

A scenario is a function whose return value goes into FOLDER/RANK.json, by its name; without torch.distributed the same
functions tell what one process does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from networks import PlainNet, images, randomised
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import singe
import singe.ranks
from singe.storage.checkpoint import FILE
from singe.training import finetune
from singe.training.finetune import Tuner

SCENARIOS: dict[str, Callable[[Path], Any]] = {}


def scenario(function: Callable[[Path], Any]) -> Callable[[Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def data() -> TensorDataset:
    return TensorDataset(*images(48, classes=4))


def loader(**options: Any) -> DataLoader:
    return DataLoader(data(), **{"batch_size": 12, "shuffle": True} | options)


def net() -> nn.Module:
    return randomised(PlainNet())


def smooth_net() -> nn.Module:
    """Without batch norm and dropout: what a batch gives is the mean of what its parts give."""
    return randomised(nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, 4),
    ))  # fmt: skip


def prune(model: nn.Module, batches: Any = None, rho: float = 0.4, **options: Any) -> Any:
    quick = {"allocation": "uniform", "compensate": "none"} if options.get("structured", True) else {}
    options = quick | {"progress": False, "finetune": None, "images": 24, "seed": 3} | options
    return singe.prune(model, loader() if batches is None else batches, rho, **options)


def told(result: singe.PruneResult) -> dict[str, Any]:
    """What must be the same whatever the number of processes."""
    return {
        "removed": [[r.group, list(r.removed)] for r in result.history],
        "scores": [list(r.scores) for r in result.history],
        "first": [list(r.first_scores) for r in result.history],
        "weights": weights(result.model),
    }


def weights(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()]).tolist()


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


CRITERIA = {
    "integrated_gradient": {"allocation": "global"},
    "full": {"criterion": "integrated_gradient", "refresh": "full"},
    "layer path": {"criterion": singe.IntegratedGradient(path="layer")},
    "gradient": {"criterion": "gradient"},
    "loss_change": {"criterion": "loss_change"},
    "magnitude": {"criterion": "magnitude"},
    "random": {"criterion": "random", "allocation": "global"},
    "reconstruction": {"criterion": "reconstruction", "allocation": "sensitivity", "compensate": "least_squares",
                       "compensation_images": 48},
    "feature_relevance": {"criterion": "feature_relevance", "ignore": ["features.0"]},
}  # fmt: skip


for name, options in CRITERIA.items():
    SCENARIOS[f"by {name}"] = lambda folder, options=options: told(prune(net(), **options))


@scenario
def single_weights(folder: Path) -> Any:
    result = prune(net(), structured=False)
    return {"masks": {name: mask.int().tolist() for name, mask in result.masks.items()}}


@scenario
def entwined(folder: Path) -> Any:
    tuned = singe.FineTune(steps=12, when="layer", lr=0.01, hints=2)
    return told(prune(smooth_net(), loader(batch_size=11), finetune=tuned))


@scenario
def between_neurons(folder: Path) -> Any:
    return told(prune(net(), finetune=singe.FineTune(steps=10, when="neuron", lr=1e-3, optimizer="adamw"), rho=0.3))


@scenario
def tuned_weights(folder: Path) -> Any:
    return weights(prune(smooth_net(), structured=False, finetune=singe.FineTune(steps=6, when="layer")).model)


@scenario
def user_forward(folder: Path) -> Any:
    """The model is called by one of its methods, and one of its parameters is not used."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.unused = smooth_net(), nn.Parameter(torch.ones(3))

        def logits(self, x: Tensor) -> Tensor:
            return self.inner(x)

    options = {
        "forward": lambda model, batch: model.logits(batch["x"]),
        "loss": lambda out, b: F.cross_entropy(out, b["y"]),
    }
    batches = [{"x": x, "y": y} for x, y in loader(shuffle=False)]
    return told(prune(Odd().eval(), batches, finetune=singe.FineTune(steps=3), **options))


@scenario
def divided_by_the_user(folder: Path) -> Any:
    """Each rank's loader has a share of the samples, which it shuffles by the number of the epoch."""
    if not dist.is_initialized():
        return None
    sampler = DistributedSampler(data(), shuffle=True)
    sampler.set_epoch(5)
    seen: list[list[int]] = []

    class Noted(singe.criteria.WeightCriterion):
        def of_rows(self, rows: Tensor) -> Tensor:
            return rows.square().sum(1)

    class Counting(DataLoader):
        def __iter__(self) -> Any:
            for x, y in super().__iter__():
                seen.append(y.tolist())
                yield x, y

    found = told(prune(net(), Counting(data(), batch_size=6, sampler=sampler), criterion=Noted(),
                       finetune=singe.FineTune(steps=4)))  # fmt: skip
    return {"result": found, "epoch": sampler.epoch, "first": seen[0]}


class Drawing(DataLoader):
    """On every rank it draws other numbers of random values, as augmentation does where lengths differ."""

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            torch.rand(3 * rank())
            yield batch


@scenario
def drawn_apart(folder: Path) -> Any:
    options: dict[str, Any] = {"batches": Drawing(data(), batch_size=12), "criterion": "random"}
    neurons, single = prune(net(), **options), prune(net(), structured=False, **options)
    return [told(neurons)["removed"], {name: mask.int().tolist() for name, mask in single.masks.items()}]


@scenario
def gradual(folder: Path) -> Any:
    model, records = net(), []
    parallel = DistributedDataParallel(model) if dist.is_initialized() else model
    pruner = singe.GradualPruner(
        parallel, images()[0], every=1, per_round=3, until=2, images=12, criterion="random", seed=rank(),
        callbacks=[records.append],
    )  # fmt: skip
    rounds = [pruner.epoch_end(loader()) for _ in range(3)]
    return {"records": len(records), "removed": [r.removed for r in rounds if r], "weights": weights(model)}


@scenario
def observed(folder: Path) -> Any:
    """Rank by rank other evaluations, and the same weights, modes and random state as before."""
    model, records = net().train(), []
    before, state = weights(model), torch.get_rng_state()
    result = prune(model, evaluate=lambda network: 7.0 + rank(), callbacks=[records.append], criterion="magnitude")
    return {
        "evaluation": [result.evaluation_before, result.evaluation_after, *(r.evaluation for r in result.history)],
        "records": len(records), "groups": len(result.history), "latency": repr(result.latency),
        "kept": weights(model) == before and model.training and torch.equal(torch.get_rng_state(), state),
    }  # fmt: skip


@scenario
def latency(folder: Path) -> Any:
    wide = randomised(nn.Sequential(nn.Linear(192, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4)))
    batches = [(x.flatten(1), y) for x, y in loader(shuffle=False)]
    result = prune(wide, batches, 0.01, target="latency", criterion="magnitude", allocation="uniform", round_to=128)
    return [list(r.removed) for r in result.history]


@scenario
def other_weights(folder: Path) -> Any:
    """As DistributedDataParallel leaves batch norms; the model of each rank stays as it is."""
    model = randomised(PlainNet(), seed=3 * rank())
    before = weights(model)
    return told(prune(model)) | {"kept": weights(model) == before}


@scenario
def others(folder: Path) -> Any:
    """What is not the same on all ranks is refused on all of them, and the next call goes well."""
    return [
        message(lambda: prune(net(), rho=0.4 + 0.1 * rank())),
        message(lambda: prune(net() if rank() == 0 else smooth_net())),
        message(lambda: prune(net(), loader() if rank() == 0 else [tuple(t[:, :2] if t.dim() > 1 else t for t in batch)
                                                                  for batch in loader()])),
        message(lambda: prune(smooth_net(), loader(batch_size=1), finetune=singe.FineTune(steps=1))),
        message(lambda: prune(net(), criterion="magnitude")),
    ]  # fmt: skip


@scenario
def failing(folder: Path) -> Any:
    """One rank fails in the middle of a run and goes on; the others are told."""
    calls = 0

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if rank() == 1 and calls == 60:
            raise ValueError("no more of this")
        return F.cross_entropy(outputs, batch[1])

    tuned = singe.FineTune(steps=100, when="layer")
    found = [message(lambda: prune(net(), loss=loss)), message(lambda: prune(net(), criterion="magnitude"))]
    calls = 0
    return [*found, message(lambda: prune(net(), loss=loss, criterion="magnitude", finetune=tuned))]


@scenario
def alone(folder: Path) -> Any:
    """Not all of them call."""
    if rank() == 1:
        return "elsewhere"

    singe.ranks.MEETING = timedelta(seconds=1)
    return message(lambda: prune(net()))


@scenario
def checkpointed(folder: Path) -> Any:
    """With KILL=N the last rank is killed behind N groups."""
    done = 0

    def evaluate(network: nn.Module) -> float:
        nonlocal done
        done += 1
        if done == int(os.environ.get("KILL", 0)) and rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    tuned = singe.FineTune(steps=8, when="layer", lr=0.01)
    return told(prune(smooth_net(), finetune=tuned, checkpoint=folder / "checkpoint", evaluate=evaluate))


@scenario
def ended_in_training(folder: Path) -> Any:
    """Ended in the third part of the training after all groups, then continued; epochs are of other lengths."""
    directory, step = folder / "training", Tuner._train_step
    own = TensorDataset(*images(44 if rank() else 36, classes=4))
    batches, tuned = DataLoader(own, batch_size=4, shuffle=True), singe.FineTune(steps=24, lr=0.01, hints=1)

    def ending(self: Tuner) -> float:
        if self.step == 20:
            raise KeyboardInterrupt
        return step(self)

    def run(checkpoint: Path | None) -> dict[str, Any]:
        return told(prune(randomised(PlainNet()), batches, finetune=tuned, checkpoint=checkpoint))

    with mock.patch.object(finetune, "SHORTEST", 5):
        undisturbed = run(None)
        with mock.patch.object(Tuner, "_train_step", ending), contextlib.suppress(KeyboardInterrupt):
            run(directory)
        with safe_open(directory / FILE, "pt") as file:
            saved = json.loads(file.metadata()["singe"])
        return [saved["tuned"], saved["tuned_parts"], run(directory) == undisturbed]


def main(folder: Path, names: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: SCENARIOS[name](folder) for name in names}
    (folder / f"{rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
