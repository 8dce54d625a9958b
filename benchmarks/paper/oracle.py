"""How well criteria rank neurons: Spearman with what removing each one alone does to the loss on held-out images.

The scores are of the unpruned network on few training images, as when pruning begins; the loss is that of test images.
Where removals change little, the images that are held out decide as much: one half of them is compared with the other.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from measuring.common import machine, spearman
from zoo_table import markdown

import singe
from paper.methods import CRITERIA
from paper.recipe import SCORING, Baseline, Stopwatch
from paper.records import Record, Records, Settings
from paper.size import Size
from singe.criteria import Criterion, Random

CPU, FULL = Size(seeds=(0, 1)), Size(seeds=(0, 1, 2, 3, 4))
LAYERS = ("blocks.4.conv1", "blocks.13.conv1", "blocks.20.conv1", "blocks.25.conv1")
"""Where a CPU looks: in each stage, and near the end."""
IMAGES, NODES = (16, 64, 256), (1, 2, 4, 8)
HELD_OUT = 2000


def run(baseline: Baseline, records: Records, options: argparse.Namespace) -> None:
    """Layer by layer, first the true loss changes, then every criterion's scores."""
    for layer in _layers(baseline, options):
        where = {"model": baseline.name, "weights": baseline.checksums["weights"][:12], "layer": layer}
        truth = loss_changes(baseline, records, where)
        for name, criterion, images in studied():
            for seed in options.seeds:
                settings = where | {"criterion": name, "of": repr(criterion), "images": images, "seed": seed}
                if any(fnmatchcase(name, pattern) for pattern in options.only) and not records.find(settings):
                    _add(baseline, records, settings, criterion, truth)


def studied() -> Iterator[tuple[str, Criterion, int]]:
    """(name, criterion, images): all criteria on 64 images, and the paper's own with more and fewer, and nodes."""
    for name, criterion in CRITERIA.items():
        if not isinstance(criterion, Random):
            yield name, criterion, 64
    for nodes, images in itertools.product(NODES, IMAGES):
        yield f"IG, {nodes} nodes", singe.IntegratedGradient(quadrature=singe.GaussLegendre(nodes)), images


def loss_changes(baseline: Baseline, records: Records, where: Settings) -> torch.Tensor:
    """By how much the loss on held-out images rises without each neuron of a layer; float64 [n]."""
    settings = where | {"criterion": "held-out loss change", "images": HELD_OUT}
    known = records.find(settings)
    if known is None:
        watch = Stopwatch()
        parts = torch.stack([
            singe.score(baseline.model, half, where["layer"], criterion="loss_change") * len(half[1])
            for x, y in baseline.held_out(HELD_OUT)
            for half in zip(x.chunk(2), y.chunk(2), strict=True)
        ])  # fmt: skip
        halves = spearman(parts[::2].sum(0), parts[1::2].sum(0))
        found = {"scores": (parts.sum(0) / HELD_OUT).tolist(), "halves": halves, "seconds": watch.seconds}
        known = records.add(settings, found | _origin(baseline))
        print(where["layer"], "held-out loss change", f"halves {halves:.3f}, {watch.seconds:.0f} s", flush=True)
    return torch.tensor(known["scores"], dtype=torch.float64)


def _add(baseline: Baseline, records: Records, settings: Settings, criterion: Criterion, truth: torch.Tensor) -> None:
    batch, watch = baseline.batches(settings["seed"], SCORING).take(settings["images"]), Stopwatch()
    scores = singe.score(baseline.model, batch, settings["layer"], criterion=criterion)
    found = {"spearman": spearman(scores, truth), "neurons": len(truth), "seconds": watch.seconds}
    records.add(settings, found | _origin(baseline))
    print(settings["layer"], settings["criterion"], settings["images"], settings["seed"], found, flush=True)


def _origin(baseline: Baseline) -> Record:
    return {"machine": machine(), "checksums": baseline.checksums}


def _layers(baseline: Baseline, options: argparse.Namespace) -> list[str]:
    if options.layers:
        return list(options.layers)
    names = [name for name, _ in baseline.model.named_modules() if fnmatchcase(name, "blocks.*.conv1")]
    return names if options.full else [name for name in names if name in LAYERS]


def page(records: Sequence[Record]) -> str:
    """Criteria by layers, and the paper's by nodes and images; means over seeds."""
    found = [r for r in records if "spearman" in r]
    layers = list(dict.fromkeys(r["settings"]["layer"] for r in found))
    halves = {r["settings"]["layer"]: r["halves"] for r in records if "halves" in r}
    names = [name for name in CRITERIA if any(r["settings"]["criterion"] == name for r in found)]
    by_layer = [[name, *(_mean(found, criterion=name, images=64, layer=layer) for layer in layers),
                 _mean(found, criterion=name, images=64)] for name in names]  # fmt: skip
    if halves:
        of_layers = [f"{halves[layer]:.3f}" if layer in halves else "-" for layer in layers]
        by_layer.append(["held-out images, two halves", *of_layers, f"{statistics.fmean(halves.values()):.3f}"])
    by_cost = [
        [f"{nodes}", *(_mean(found, criterion=f"IG, {nodes} nodes", images=images) for images in IMAGES)]
        for nodes in NODES
    ]
    return "\n\n".join([
        markdown(["64 images", *layers, "mean"], by_layer),
        "The paper's criterion by nodes on the path and images; a gradient for each node, image and neuron.",
        markdown(["nodes", *(f"{images} images" for images in IMAGES)], by_cost),
    ])  # fmt: skip


def _mean(records: Sequence[Record], **settings: str | int) -> str:
    values = [r["spearman"] for r in records if settings.items() <= r["settings"].items()]
    return f"{statistics.fmean(values):.3f}" if values else "-"
