"""Whether runs survive being killed, files do no harm, and memory does not grow.

python benchmarks/reliability.py kills [--count 20] [--json FILE]
python benchmarks/reliability.py files [--count 7000] [--json FILE]
python benchmarks/reliability.py repeats [--count 1000] [--json FILE]

Findings are added to the file beside those of the other questions. kills needs scikit-learn, for the demo's digits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import reliability_files
import reliability_kills
import reliability_repeats
import torch
from measuring.common import machine, settings, write_json

QUESTIONS = {"kills": reliability_kills, "files": reliability_files, "repeats": reliability_repeats}
COUNTS = {"kills": 20, "files": 7000, "repeats": 1000}
"""How many runs; mutants of each kind of file; prunes."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    question = QUESTIONS[options.question]
    found = question.measure(options.count or COUNTS[options.question], options.seed)
    print(question.text(found))
    if options.json:
        earlier = json.loads(options.json.read_text()) if options.json.exists() else {}
        earlier.pop("machine", None)
        where = {key: machine()[key] for key in ("date", "revision")}
        write_json(options.json, {**earlier, options.question: {**where, "options": settings(options), **found}})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--count", type=int, help="runs to kill, mutants of each kind of file, or prunes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
