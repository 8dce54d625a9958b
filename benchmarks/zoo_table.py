"""The findings of zoo.py as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Finding = dict[str, Any]

_TEXT = """\
# The zoo

Does `singe` prune the models that people use? Each of these was analysed, and pruned by 30 % and by 60 % of the
parameters that can be removed at all, by magnitude and without training. None is trained: weights, scales and batch
norm statistics are random, chosen so that every neuron matters. So the table shows what is removed and whether it is
removed correctly; it says nothing about accuracy.

{summary}

## How to read it

- *groups*: the groups of coupled neurons that can lose some. *units*: all neurons. *whole*: the share of them that
  is left whole, and the most frequent reasons with their numbers of neurons.
- *analysis*: seconds for export, groups and trial removal.
- *gone*: share of the whole model's parameters that is gone. *difference*: the largest between the outputs of the
  smaller model and of the masked one, relative to the largest output; up to 1e-4 counts as equal. *trains*: a forward
  and a backward pass in train mode give a gradient to all parameters that got one before, and shared ones are still
  shared.
- *Torch-Pruning*: seconds to build the pruner and to prune with `MagnitudeImportance`, layer by layer, 30 % and 60 % of
  the channels with the classifier ignored. It is called as its documents and examples say: the heads of timm's
  attention are passed on, and widths stored in attention modules are updated afterwards. Its ratio counts channels,
  not parameters, so the shares gone are not comparable. The checks here are whether something was removed, outputs
  have their shapes and the model trains, not whether the rest computes what masking would. A user who registers
  custom pruners for a model can get further.
- Each model and tool ran in a separate process, limited to {seconds:g} s and {memory:g} GiB. Failures are
  quoted by their first line.

## Results

{table}

Made by `python benchmarks/zoo.py`, then `--table`: {made}.
"""
_HEADER = [
    "model", "parameters", "groups", "units", "whole", "analysis",
    "30 %: gone", "difference", "trains", "60 %: gone", "difference", "trains",
    "Torch-Pruning", "30 %: gone", "60 %: gone",
]  # fmt: skip


def page(found: Finding) -> str:
    """The page for a file that zoo.py wrote."""
    rows, options = found["rows"], found["options"]
    lines = [
        [f"`{name}`", *_singe(row.get("singe", {})), *_peer(row.get("torch_pruning", {}))] for name, row in rows.items()
    ]
    return _TEXT.format(
        summary=_summary(list(rows.values())), seconds=options["seconds"], memory=options["memory"] / 2**30,
        table=markdown(_HEADER, lines), made=_made(found),
    )  # fmt: skip


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    cells = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def passes(finding: Finding) -> bool:
    """Whether both shares were removed and nothing was found wrong."""
    return all(share in finding and finding[share]["problem"] is None for share in ("0.3", "0.6"))


def _summary(rows: Sequence[Finding]) -> str:
    lines = []
    for tool, name in (("singe", "singe"), ("torch_pruning", "Torch-Pruning")):
        tried = [row[tool] for row in rows if tool in row]
        lines.append(f"{name}: {sum(map(passes, tried))} of {len(tried)} models pass at both shares.")
    return "\n".join(lines)


def _singe(finding: Finding) -> list[str]:
    analysis = finding.get("analysis", {"problem": finding.get("problem", finding.get("stopped", "not measured"))})
    if "problem" in analysis:
        return ["-"] * 3 + [_quoted(analysis["problem"])] + ["-"] * 7
    first = [f"{analysis['params']:,}", f"{analysis['groups']:,}", f"{analysis['units']:,}", _whole(analysis)]
    return [*first, f"{analysis['seconds']:.1f} s", *_pruned(finding, "0.3"), *_pruned(finding, "0.6")]


def _whole(analysis: Finding) -> str:
    frozen = analysis["frozen"]
    shown = [f"{_quoted(reason, 60)} {count:,}" for reason, count in list(frozen.items())[:3]]
    more = [f"{len(frozen) - 3} more"] if len(frozen) > 3 else []
    return f"{sum(frozen.values()) / analysis['units']:.0%}: {'; '.join(shown + more)}"


def _pruned(finding: Finding, share: str) -> list[str]:
    if share not in finding:
        return ["-", "-", _quoted(finding.get("stopped", "nothing can go"))]
    result = finding[share]
    trains = "yes" if result["problem"] is None else _quoted(result["problem"])
    if "params" not in result:
        return ["-", "-", trains]
    return [f"{result['params']:.1%}", f"{result['difference']:.0e}", trains]


def _peer(finding: Finding) -> list[str]:
    """Seconds of the first share that was pruned, and the outcome of each."""
    times = [
        f"{r['building']:.1f} + {r['pruning']:.1f} s"
        for share in ("0.3", "0.6")
        if "building" in (r := finding.get(share, {}))
    ]
    return [*(times or ["-"])[:1], *(_outcome(finding, share) for share in ("0.3", "0.6"))]


def _outcome(finding: Finding, share: str) -> str:
    if share not in finding:
        return _quoted(finding.get("problem", finding.get("stopped", "not measured")))
    result = finding[share]
    gone = [f"{result['params']:.1%}"] if "params" in result else []
    return ", but ".join(gone + ([_quoted(result["problem"])] if result["problem"] else []))


def _quoted(problem: str, length: int = 90) -> str:
    return problem if len(problem) <= length else f"{problem[:length].rstrip()}…"


def _made(found: Finding) -> str:
    """The packages, and where and when the rows of each tool were measured."""
    versions = [f"{package} {version}" for package, version in found["versions"].items()]
    parts = [", ".join([f"torch {found['machine']['torch']}", *versions])]
    for tool, title in (("singe", "singe"), ("torch_pruning", "Torch-Pruning")):
        rows = [row[tool] for row in found["rows"].values() if tool in row]
        where = sorted({f"{row['threads']} threads of an {row['processor']} for each process" for row in rows})
        when = sorted({row["date"] for row in rows}), sorted({row["revision"] for row in rows})
        parts.append(", ".join([f"{title} on {' or '.join(where)}", *when[0], f"revision {', '.join(when[1])}"]))
    return "; ".join(parts)
