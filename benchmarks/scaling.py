"""How a run is divided among processes: the same work by one, two and three, and how much they send each other.

python benchmarks/scaling.py --weights FILE --data DIR --processes 1 2 3 [--groups 'blocks.1?.conv1'] [--json FILE]

All processes are on this machine and have one thread each; the backend is gloo. Processor seconds are those of all of
them together, so that repeated work shows even where there are more processes than cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine.images import loader
from measuring.common import settings, write_json
from models import MODELS, load

import singe
from singe.ranks import Ranks, meeting
from singe.table import table

prune_module = sys.modules["singe.prune"]  # the package has the function by this name


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if "RANK" in os.environ:
        return work(options)
    torch.set_num_threads(1)  # as in the measured processes
    found = [summed(size, launched(options, size)) for size in options.processes]
    plans = [run.pop("plan") for run in found]
    found = [run | {"same_plan": plan == plans[0]} for run, plan in zip(found, plans, strict=True)]
    print(text(found))
    if options.json:
        write_json(options.json, {"options": settings(options), "runs": found})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file; random weights by default")
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10; noise by default")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--criterion", default="integrated_gradient")
    parser.add_argument("--refresh", choices=["lazy", "full"], default="lazy")
    parser.add_argument("--groups", default="blocks.1?.conv1", help="a glob; all others are left whole")
    parser.add_argument("--batch", type=int, default=64, help="images that scores are computed on")
    parser.add_argument("--steps", type=int, default=0, help="of fine-tuning")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def launched(options: argparse.Namespace, size: int) -> list[dict[str, Any]]:
    """The findings of each process of a run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(size),
            __file__,
        ]
        for name, value in vars(options).items():
            if value is not None and name not in ("json", "processes"):
                command += [f"--{name}", str(value)]
        subprocess.run([*command, "--json", f"{folder}/rank"], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return [json.loads(Path(folder, f"rank{rank}").read_text()) for rank in range(size)]


def work(options: argparse.Namespace) -> None:
    """One process's part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, met = load(options.model, options.weights), list[Ranks]()
    data = loader(options.model, options.data, options.batch, torch.device("cpu"))
    names = [group.name for group in singe.inspect(model, next(iter(data))[0][:2]).groups]
    whole = [name for name in names if not fnmatchcase(name, options.groups)]

    @contextmanager
    def noted() -> Iterator[Ranks]:
        with meeting() as ranks:
            met.append(ranks)
            yield ranks

    prune_module.meeting = noted  # type: ignore[attr-defined]
    tuned = singe.FineTune(steps=options.steps) if options.steps else None
    wall, busy = time.perf_counter(), time.process_time()
    result = singe.prune(
        model, data, options.rho, criterion=options.criterion, refresh=options.refresh, images=options.batch,
        ignore=whole, allocation="uniform", compensate="none", finetune=tuned, progress=False,
    )  # fmt: skip
    found = {
        "seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - busy,
        "scoring": result.seconds["scoring"], "sent": met[0].sent,
        "removals": sum(len(record.removed) for record in result.history),
        "scored": sum(record.neurons_scored for record in result.history),
        "neurons": sum(record.size for record in result.history),
        "plan": result.plan.to_json(),
    }  # fmt: skip
    Path(f"{options.json}{dist.get_rank()}").write_text(json.dumps(found))
    dist.destroy_process_group()


def summed(size: int, ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A run as a whole, in which all ranks have done the same."""
    if any(rank["plan"] != ranks[0]["plan"] for rank in ranks):
        raise RuntimeError(f"{size} processes came to different plans")
    shared = {name: ranks[0][name] for name in ("seconds", "scoring", "sent", "removals", "scored", "neurons", "plan")}
    return {"processes": size, "processor_seconds": sum(rank["processor_seconds"] for rank in ranks), **shared}


def text(runs: Sequence[dict[str, Any]]) -> str:
    first = runs[0]
    rows = [
        [
            f"{run['processes']}", f"{run['seconds']:.1f}", f"{first['seconds'] / run['seconds']:.2f}",
            f"{run['scoring']:.1f}", f"{first['scoring'] / run['scoring']:.2f}",
            f"{run['processor_seconds']:.1f}", f"{run['processor_seconds'] / first['processor_seconds']:.2f}",
            f"{run['sent'] / run['removals']:.0f}", "yes" if run["same_plan"] else "no",
        ]
        for run in runs
    ]  # fmt: skip
    header = ["processes", "s", "times as fast", "scoring s", "times as fast", "processor s", "times as much",
              "bytes a removal", "same plan"]  # fmt: skip
    return table(header, rows)


if __name__ == "__main__":
    main()
