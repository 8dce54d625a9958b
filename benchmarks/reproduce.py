"""The paper's tables and figures, on real data, beside its peers; finished runs are never repeated.

python benchmarks/reproduce.py peers --weights resnet56.safetensors --data CIFAR10_DIR --rates 0.85 --steps 0 1000
python benchmarks/reproduce.py all --weights resnet56.safetensors --data CIFAR10_DIR [--full]
python benchmarks/reproduce.py peers --table

Every run leaves a line in RESULTS/SCRIPT.jsonl, and the table is in RESULTS/SCRIPT.md. --full takes three seeds, all
rates and as many steps as the paper; the default is for a CPU. --table runs nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import get_args

from models import CIFAR10_MODELS
from paper import figure2, imagenet, oracle, peers, table1, table2, table3, table6, tables
from paper.recipe import LR, cifar10_baseline
from paper.records import Record, Records

from singe.models.precision import Precision

SCRIPTS = {
    "peers": peers, "table1": table1, "table2": table2, "oracle": oracle, "figure2": figure2, "table3": table3,
    "table6": table6, "imagenet": imagenet,
}  # fmt: skip
RESULTS = Path(__file__).parent / "results" / "paper"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = [name for name in SCRIPTS if name != "imagenet"] if options.script == "all" else [options.script]
    make = imagenet.baseline if options.script == "imagenet" else cifar10_baseline
    baseline = None if options.table else make(options)
    for name in names:
        script, records = SCRIPTS[name], Records(options.results / f"{name}.jsonl")
        sized = _sized(options, script)
        if baseline is not None:
            script.run(baseline, records, sized)
        write(script, records.all(), options.results / f"{name}.md")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["all", *SCRIPTS])
    parser.add_argument("--model", choices=[*CIFAR10_MODELS, "resnet50"], default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file, as train_cifar10.py writes it")
    parser.add_argument("--data", type=Path, help="the folder of CIFAR-10; for imagenet one with train/ and val/")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a directory of records and tables")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of rows, or globs")
    parser.add_argument("--rates", type=float, nargs="+", help="shares of the parameters to remove")
    parser.add_argument("--steps", type=int, nargs="+", help="of fine-tuning; 0 for none")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--layers", nargs="+", help="of oracle and figure2")
    parser.add_argument("--open", choices=["inner", "all"], default="inner", help="prune residual streams, too?")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=LR, help="of fine-tuning")
    parser.add_argument("--hints", type=float, default=0.0, help="weight of hints in fine-tuning")
    parser.add_argument("--precision", choices=get_args(Precision), help="of fine-tuning; the network's own by default")
    parser.add_argument("--workers", type=int, default=0, help="processes that read ImageNet")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="three seeds, all rates, all steps")
    parser.add_argument("--table", action="store_true", help="only write the table, from the records")
    options = parser.parse_args(arguments)
    if not options.table and (options.data is None or (options.weights is None and options.script != "imagenet")):
        parser.error("expected --weights FILE and --data DIR, or --table")
    known = imagenet.RATES if options.script == "imagenet" else CIFAR10_MODELS
    if options.model not in known:
        parser.error(f"expected a model among {', '.join(known)} for {options.script}, got {options.model!r}")
    return options


def _sized(options: argparse.Namespace, script: ModuleType) -> argparse.Namespace:
    """The options, with the script's own rates, steps and seeds where none are given."""
    size = script.FULL if options.full else script.CPU
    return argparse.Namespace(**vars(options) | {k: getattr(options, k) or v for k, v in vars(size).items()})


def write(script: ModuleType, records: list[Record], path: Path) -> None:
    """Writes the table of a script, and its figure where matplotlib is there."""
    if records:
        path.parent.mkdir(parents=True, exist_ok=True)
        title = " ".join(script.__doc__.split())
        path.write_text(f"{title}\n\n{script.page(records)}\n\n{tables.origin(records)}\n")
        if hasattr(script, "plot") and importlib.util.find_spec("matplotlib"):
            script.plot(records, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
