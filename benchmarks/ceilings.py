"""The most the machine can do: bytes copied and multiply-adds of matrices, to compare other numbers with.

python benchmarks/ceilings.py [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from measuring.common import settings, write_json
from measuring.timing import Way, timed

from singe.models.precision import Precision, arithmetic
from singe.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    device = torch.device(options.device)
    sizes = {"cpu": (256, 2048), "cuda": (4096, 8192)}[device.type]
    mebibytes, side = options.mebibytes or sizes[0], options.side or sizes[1]
    copied = copy_bandwidth(mebibytes << 20, device, options.rounds)
    multiplied = {name: matmul(name, side, device, options.rounds) for name in precisions(device)}
    lines = [["copy, read and written", f"{copied / 1e9:.1f} GB/s"]]
    lines += [[f"matmul, {name}", f"{macs / 1e12:.3f} T multiply-adds/s"] for name, macs in multiplied.items()]
    print(table(["ceiling", str(device)], lines))
    if options.json:
        result = {"copy_bytes_per_second": copied, "matmul_multiply_adds_per_second": multiplied}
        write_json(options.json, {"options": settings(options), **result})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mebibytes", type=int, help="to copy; by default more than any cache holds")
    parser.add_argument("--side", type=int, help="of the square matrices; by default enough to keep all units busy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def precisions(device: torch.device) -> list[Precision]:
    """The precisions that a device supports."""
    return ["float32", "tf32", "bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"]


def copy_bandwidth(count: int, device: torch.device, rounds: int) -> float:
    """Bytes read and written in a second when ``count`` bytes are copied."""
    source, target = (torch.rand(count // 4, device=device) for _ in range(2))
    return 2 * count / best(partial(target.copy_, source), rounds, device)


def matmul(precision: Precision, side: int, device: torch.device, rounds: int) -> float:
    """Multiply-adds in a second of a product of two square matrices."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    # the precision bfloat16 means autocast, which does not affect operators with an output argument
    with arithmetic("float32" if precision == "bfloat16" else precision, device):
        return side**3 / best(partial(torch.mm, a, b, out=out), rounds, device)


def best(way: Way, rounds: int, device: torch.device) -> float:
    """The least seconds of some calls, after a warm-up call."""
    way()
    return min(timed(way, device)[1] for _ in range(rounds))


if __name__ == "__main__":
    main()
