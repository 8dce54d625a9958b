"""Whether scoring stays within the memory it is given, on networks for large images too.

python benchmarks/memory.py --model vgg16 [--batch 64] [--layers features.0 ...] [--memory BYTES ...] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from engine.images import Batch
from engine.subject import Subject, prepare
from measuring.common import mebibytes, settings, write_json
from measuring.peak import with_peak
from measuring.timing import timed
from models import MODELS

import singe
from singe.graph.groups import Group
from singe.scoring.engine import Engine
from singe.table import table


@dataclass(frozen=True)
class Use:
    """One layer scored within a memory limit.

    Attributes:
        layer: its name.
        memory: bytes that it was given.
        peak: bytes that it took at most, from the engine's start; None where this is unknown.
        parts: the number of parts the images were divided into.
        jobs: how many ran at a time.
        seconds: in total.
    """

    layer: str
    memory: int
    peak: int | None
    parts: int
    jobs: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    subject = prepare(options)
    (batch,) = subject.batches(1)
    groups = [g for name in options.layers or [subject.groups[0].name] for g in subject.matching(name)]
    uses = [measure(subject, group, batch, memory, options) for group in groups for memory in options.memory]
    print(text(uses))
    if options.json:
        write_json(options.json, {"options": settings(options), "uses": [asdict(use) for use in uses]})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vgg16")
    parser.add_argument("--weights", type=Path, help="a safetensors file; random weights by default")
    parser.add_argument("--layers", nargs="+", help="the first by default")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--memory", type=int, nargs="+", default=[1 << 30])
    parser.add_argument("--neurons", type=int, default=1, help="of each layer to score")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(data=None)
    return parser.parse_args(arguments)


def measure(subject: Subject, group: Group, batch: Batch, memory: int, options: argparse.Namespace) -> Use:
    """Starts an engine and scores some neurons."""
    criterion = singe.IntegratedGradient(quadrature=singe.GaussLegendre(options.nodes))

    def score() -> Engine:
        engine = Engine(subject.folded, subject.graph, group, batch, memory=memory)
        engine.scores(criterion, torch.arange(min(options.neurons, group.size)))
        return engine

    (engine, peak), seconds = timed(partial(with_peak, score, subject.device), subject.device)
    return Use(group.name, memory, peak, engine.parts, engine.chunk, seconds)


def text(uses: Sequence[Use]) -> str:
    header = ["layer", "memory MiB", "peak MiB", "parts", "jobs at a time", "seconds"]
    return table(
        header,
        [
            [u.layer, mebibytes(u.memory), mebibytes(u.peak), str(u.parts), str(u.jobs), f"{u.seconds:.1f}"]
            for u in uses
        ],
    )


if __name__ == "__main__":
    main()
