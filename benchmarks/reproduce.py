"""The paper's tables and figures, on real data, beside its peers; what is done already is never run again.

python benchmarks/reproduce.py peers --weights resnet56.safetensors --data CIFAR10_DIR --rates 0.85 --steps 0 1000
python benchmarks/reproduce.py all --weights resnet56.safetensors --data CIFAR10_DIR [--full]
python benchmarks/reproduce.py peers --table

Every run leaves a line in RESULTS/SCRIPT.jsonl, and the table is in RESULTS/SCRIPT.md. --full takes three seeds, all
rates and as many steps as the paper; the default is for a CPU. --table runs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from models import CIFAR10_MODELS
from paper import peers, tables
from paper.recipe import cifar10_baseline
from paper.records import Record, Records
from paper.rows import measure

SCRIPTS = {"peers": peers}
RESULTS = Path(__file__).parent / "results" / "paper"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    baseline = None if options.table else cifar10_baseline(options)
    for name in SCRIPTS if options.script == "all" else [options.script]:
        script, records = SCRIPTS[name], Records(options.results / f"{name}.jsonl")
        sized = _sized(options, script)
        if baseline is not None:
            measure(script.rows(sized), baseline, records, sized)
        write(script, records.all(), options.results / f"{name}.md")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["all", *SCRIPTS])
    parser.add_argument("--model", choices=CIFAR10_MODELS, default="resnet56")
    parser.add_argument("--weights", type=Path, help="a safetensors file, as train_cifar10.py writes it")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS, help="a directory of records and tables")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of rows, or globs")
    parser.add_argument("--rates", type=float, nargs="+", help="shares of the parameters to remove")
    parser.add_argument("--steps", type=int, nargs="+", help="of fine-tuning; 0 for none")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--open", choices=["inner", "all"], default="inner", help="prune residual streams, too?")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="three seeds, all rates, all steps")
    parser.add_argument("--table", action="store_true", help="only write the table, from the records")
    options = parser.parse_args(arguments)
    if not options.table and None in (options.weights, options.data):
        parser.error("expected --weights FILE and --data DIR, or --table")
    return options


def _sized(options: argparse.Namespace, script: ModuleType) -> argparse.Namespace:
    """With the script's own rates, steps and seeds where none are given."""
    full = options.full
    own = {
        "rates": script.FULL_RATES if full else script.RATES,
        "steps": script.FULL_STEPS if full else script.STEPS,
        "seeds": (0, 1, 2) if full else (0,),
    }
    return argparse.Namespace(**vars(options) | {k: getattr(options, k) or v for k, v in own.items()})


def write(script: ModuleType, records: list[Record], path: Path) -> None:
    """Writes the table of a script."""
    if records:
        path.parent.mkdir(parents=True, exist_ok=True)
        title = " ".join(script.__doc__.split())
        path.write_text(f"{title}\n\n{script.page(records)}\n\n{tables.origin(records)}\n")


if __name__ == "__main__":
    main()
