"""The command line: ``singe demo`` and ``singe info``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a subcommand; see ``singe --help``."""
    parser = argparse.ArgumentParser(prog="singe", description="Structured pruning by integrated gradients.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="train a small ResNet on handwritten digits, prune it, show what is left")
    commands.add_parser("info", help="print versions, what was built, and devices")
    command = parser.parse_args(arguments).command
    if command == "demo":
        from . import demo

        demo.run(print)
    else:
        from . import info

        info.main()
