"""Models of torchvision, of timm and our own through singe, and beside it the same ones through Torch-Pruning.

python benchmarks/zoo.py [NAMES ...] [--no-peers] [--jobs N] [--json FILE]
python benchmarks/zoo.py --table

Names are globs such as 'timm/*'; all models by default. Every model and tool runs in a separate process with limits on
time and memory. Findings are added to the file as they come, replacing earlier ones of the same model and tool.
--table measures nothing and turns the file into a page. Needs torchvision, timm and, for peers, torch-pruning.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from measuring.common import machine, settings, write_json
from measuring.isolated import findings
from zoo_models import MODELS
from zoo_table import page

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "zoo.json", HERE.parent / "docs" / "zoo.md"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(page(json.loads(options.json.read_text())))
        return
    torch.set_num_threads(options.threads)
    rows = json.loads(options.json.read_text())["rows"] if options.json.exists() else {}
    where = {key: machine()[key] for key in ("date", "revision", "processor")} | {"threads": options.threads}
    for name, tool, found in measured(options):
        rows.setdefault(name, {})[tool] = where | found
        ordered = {known: rows[known] for known in MODELS if known in rows}
        write_json(options.json, {"options": settings(options), "versions": versions(), "rows": ordered})
        print(name, tool, found.get("stopped", "done"), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["*"], help="globs; all models by default")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True, help="Torch-Pruning too")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; they share the threads")
    parser.add_argument("--seconds", type=float, default=900, help="that one process may take")
    parser.add_argument("--memory", type=int, default=8 << 30, help="bytes of address space that it may take")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, nargs="?", const=PAGE, help="only write this page, from the JSON file")
    options = parser.parse_args(arguments)
    for pattern in options.names:
        if not any(fnmatchcase(name, pattern) for name in MODELS):
            parser.error(f"expected models among {', '.join(MODELS)}, got {pattern!r}")
    options.models = [n for n in MODELS if any(fnmatchcase(n, pattern) for pattern in options.names)]
    options.threads = max(1, torch.get_num_threads() // options.jobs)
    missing = [] if options.table else sorted(p for p in _packages(options) if importlib.util.find_spec(p) is None)
    if missing:
        parser.error(f"expected {', '.join(missing)} to be installed")
    return options


def _packages(options: argparse.Namespace) -> set[str]:
    libraries = {name.partition("/")[0] for name in options.models} - {"own"}
    return libraries | ({"torch_pruning"} if options.peers else set())


def versions() -> dict[str, str]:
    """Versions of the measured packages, as far as they are installed."""
    installed = {d.metadata["Name"]: d.version for d in distributions()}
    return {name: installed[name] for name in ("torchvision", "timm", "torch-pruning") if name in installed}


def measured(options: argparse.Namespace) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model, tool, findings), each as soon as it is done."""
    tools = ["singe", "torch_pruning"] if options.peers else ["singe"]
    with ThreadPoolExecutor(options.jobs) as pool:  # threads, each of which waits for a process
        work = {
            pool.submit(findings, command(name, tool, options), options.seconds): (name, tool)
            for tool in tools
            for name in options.models
        }
        for done in as_completed(work):
            yield *work[done], done.result()


def command(name: str, tool: str, options: argparse.Namespace) -> list[str]:
    """The command that measures one model with one tool."""
    limits = ["--memory", str(options.memory), "--threads", str(options.threads)]
    return [sys.executable, str(HERE / "zoo_one.py"), tool, name, *limits]


if __name__ == "__main__":
    main()
