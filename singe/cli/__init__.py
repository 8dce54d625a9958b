"""The command line: ``singe prune``, ``inspect``, ``report``, ``export``, ``demo`` and ``info``; see docs/cli.md."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..runs.neurons import NeuronRun
from ..runs.weights import WeightRun
from ..storage.checkpoint import FILE as CHECKPOINT
from . import commands, config
from .parser import build

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

_OF_INPUT = (TypeError, ValueError, ImportError, FileNotFoundError, NotADirectoryError, FileExistsError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; see ``singe --help``.

    Args:
        arguments: the command line after the program's name; that of this process by default.

    Returns:
        the exit code: 0 done, 1 the run failed, 2 bad input, 130 interrupted.

    Raises:
        SystemExit: with 0 where help was asked for, with 2 where the arguments cannot be parsed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.Namespace(traceback="--traceback" in words)
    try:
        with _log_on_stderr() as handler:
            options = parse(words)
            if _runs_unseen(options):
                handler.setLevel(logging.INFO)  # where there is no bar, the log says how far it is
            commands.RUN[options.command](options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        kept = getattr(options, "checkpoint", None)
        resumes = f"; the same command resumes from {kept}" if kept and (kept / CHECKPOINT).exists() else ""
        return _ended(f"interrupted{resumes}", INTERRUPTED, options)
    except BrokenPipeError:  # the reader has stopped, as with | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        refused = isinstance(error, _OF_INPUT) and not _within_a_run(error)
        return _ended(f"error: {_in_a_line(error)}", REFUSED if refused else FAILED, options)
    return DONE


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, with those of the configuration file that it names.

    Raises:
        FileNotFoundError, ValueError: that file cannot be read, or holds something invalid.
        SystemExit: see :func:`main`.
    """
    parser, by_command = build()
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, nargs="?")
    path = early.parse_known_args(words)[0].config if words and words[0] in by_command else None
    if path is not None:
        known = {name for command in by_command.values() for name in config.settings(command)}
        words = [words[0], *config.arguments(path, by_command[words[0]], known), *words[1:]]
    options, others = parser.parse_known_args(words)
    if others:
        command = by_command[options.command]
        near = difflib.get_close_matches(others[0].partition("=")[0], command._option_string_actions, 1)
        command.error(f"unrecognized arguments: {' '.join(others)}" + (f"; perhaps {near[0]}" if near else ""))
    return options


def _runs_unseen(options: argparse.Namespace) -> bool:
    """Whether a command is to say how far it is, and cannot draw bars."""
    running = options.command == "prune" and not options.dry_run
    return running and options.progress is not False and not sys.stderr.isatty()


def _ended(message: str, code: int, options: argparse.Namespace) -> int:
    if options.traceback:
        traceback.print_exc()
    print(f"singe: {message}", file=sys.stderr)
    return code


def _in_a_line(error: Exception) -> str:
    """An error's message, and its type where the message may not explain itself."""
    said = " ".join(str(error).split())
    if said and isinstance(error, (TypeError, ValueError, OSError, ImportError)):
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _within_a_run(error: BaseException) -> bool:
    """Whether an error comes from a run that had begun, which all checks of what was given come before."""
    passed = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return not passed.isdisjoint({NeuronRun.execute.__code__, WeightRun.execute.__code__})


@contextmanager
def _log_on_stderr() -> Iterator[logging.Handler]:
    """The library's warnings appear on stderr, above a bar if there is one; the handler may be set to say more."""
    log, handler = logging.getLogger("singe"), _Above(logging.WARNING)
    level = log.level
    log.addHandler(handler)
    log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
    try:
        yield handler
    finally:
        log.setLevel(level)
        log.removeHandler(handler)


class _Above(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        kind = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        tqdm.write(f"singe: {kind}{record.getMessage()}", file=sys.stderr)
