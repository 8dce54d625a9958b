"""The options of the command line; defaults and choices are those of ``singe.prune``."""

from __future__ import annotations

import argparse
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from ..allocation.goal import Target
from ..models.precision import Precision
from ..prune import prune
from ..refit.compensation import Compensate
from ..scoring.selection import Refresh
from ..training.finetune import FineTune
from ..version import __version__
from .datasets import BATCH_SIZE, IMAGE_SIZE

Options = argparse._ArgumentGroup

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

EXIT_CODES = "exit codes: 0 done; 1 the run failed; 2 bad usage or bad input, refused before any work; 130 interrupted"

_EXAMPLES = {
    "prune": """examples:
  singe prune --model models:resnet56 --weights resnet56.safetensors --data cifar10:cifar-10-batches-bin \\
      --rho 0.5 --out pruned/
  singe prune --model "torchvision.models:resnet18(num_classes=10)" --weights resnet18.pt \\
      --data imagefolder:images/ --rho 0.6 --finetune steps=5000 lr=0.01 --out pruned/ --checkpoint run/
  singe prune --config prune.toml --rho 0.7 --dry-run

  The file holds options of the command line, under the same names with underscores; the command line overrides
  it:
      model = "models:resnet56"
      weights = "resnet56.safetensors"
      data = "cifar10:cifar-10-batches-bin"
      rho = 0.5
      out = "pruned/"
      round_to = 8
      ignore = ["fc"]
      finetune = { steps = 2000, lr = 0.01 }""",
    "inspect": """examples:
  singe inspect --model models:resnet56 --example 1,3,32,32
  singe inspect --model "timm:create_model('convnext_tiny')" --example 1,3,224,224 --ignore 'stages.3.*'
  singe inspect --config prune.toml""",
    "report": """examples:
  singe report pruned/
  singe report pruned/ --out report/""",
    "export": """examples:
  singe export pruned/ --onnx pruned.onnx --model models:resnet56 --example 1,3,32,32
  singe export pruned/ --onnx pruned.onnx --config pruned/run.toml""",
    "demo": """example:
  singe demo""",
    "info": """example:
  singe info""",
}


_USAGE = {
    "prune": "singe prune --model REF --weights FILE --data REF --rho SHARE --out DIR [options]",
    "inspect": "singe inspect --model REF (--example SHAPE | --data REF) [options]",
    "report": "singe report DIR [--out DIR]",
    "export": "singe export DIR --onnx FILE --model REF (--example SHAPE | --data REF) [options]",
    "demo": "singe demo",
    "info": "singe info",
}


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of its commands by name."""
    parser = Parser(
        prog="singe",
        description="Structured pruning of PyTorch networks by integrated gradients.",
        epilog=f"{EXIT_CODES}\n\n'singe COMMAND --help' has examples and all options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"singe {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    known = {}
    for name, (summary, add) in _COMMANDS.items():
        known[name] = commands.add_parser(
            name,
            usage=_USAGE[name],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"{_EXAMPLES[name]}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add(known[name])
        known[name].add_argument("--traceback", action="store_true", help="show where an error comes from")
    return parser, known


# -- commands --------------------------------------------------------------------------------------------------


def _prune(parser: Parser) -> None:
    _network(parser)
    _data(parser, required=True)
    _removed(parser.add_argument_group("what to remove"))
    _chosen(parser.add_argument_group("how it is chosen"))
    _kept(parser.add_argument_group("how accuracy is kept"))
    _run(parser.add_argument_group("the run"))


def _removed(group: Options) -> None:
    group.add_argument("--rho", type=float, required=True, metavar="SHARE", help="share to remove, in (0, 1)")
    _literal(group, "target", Target, "what rho is a share of")
    group.add_argument(
        "--allocation", nargs="+", metavar="HOW",
        help="sensitivity, global, uniform, linear or block; or relative rates as PATTERN=RATE ..., 1 for all others "
        "(default: sensitivity, for single weights uniform)",
    )  # fmt: skip
    _whole(group, "latency_batch", "samples in the forward pass that --target latency measures")
    _whole(group, "round_to", "layers keep a multiple of this many channels")
    group.add_argument(
        "--max-rate", type=float, metavar="SHARE", help="what a group loses at most" + _default("max_rate")
    )
    _ignore(group)
    group.add_argument(
        "--structured",
        action=argparse.BooleanOptionalAction,
        help="remove whole neurons (default), or mask single weights",
    )


def _chosen(group: Options) -> None:
    group.add_argument(
        "--criterion", metavar="NAME",
        help="a name such as magnitude, or package.module:criterion for an object (default: integrated_gradient; of "
        "single weights magnitude)",
    )  # fmt: skip
    _whole(group, "images", "samples that scores are computed on")
    _literal(group, "refresh", Refresh, "which neurons are scored again after a removal")
    _literal(group, "precision", Precision, "arithmetic of the passes that compute scores")
    group.add_argument(
        "--memory",
        type=_bytes,
        metavar="BYTES",
        help="that passes may take, such as 512MiB (default: 1GiB, or a sixteenth of a GPU's if that is more)",
    )
    _analysis_seconds(group)
    _whole(group, "seed", "of everything random")


def _kept(group: Options) -> None:
    given = {field.name: field.default for field in fields(FineTune)} | {"lr": FineTune().learning_rate}
    fine_tuning = " ".join(f"{name}={value}" for name, value in given.items())
    group.add_argument("--finetune", nargs="+", metavar="NAME=VALUE", help=f"none; or changes to {fine_tuning.lower()}")
    group.add_argument(
        "--compensate", choices=get_args(Compensate),
        help="how the layers after a group are refitted (default: least_squares, for single weights none)",
    )  # fmt: skip
    _whole(group, "compensation_images", "samples for that")
    _whole(group, "recalibrate_bn", "images to estimate batch norm statistics on at the end")
    group.add_argument("--loss", metavar="REF", help="package.module:function (outputs, batch) -> scalar")
    _forward(group)


def _run(group: Options) -> None:
    group.add_argument("--out", type=Path, metavar="DIR", help="where the result goes; needed except for a dry run")
    group.add_argument(
        "--evaluate", metavar="REF",
        help="package.module:function (model) -> number, the higher the better (default: accuracy on test data)",
    )  # fmt: skip
    group.add_argument(
        "--test-images", type=_positive, metavar="N",
        help="for accuracy before, after every group, and at the end (default: all)",
    )  # fmt: skip
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="every group, for TensorBoard")
    group.add_argument("--checkpoint", type=Path, metavar="DIR", help="keeps what the same command needs to continue")
    group.add_argument(
        "--dry-run", action="store_true", help="only say what would be removed, and how long it would take"
    )
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="bars on stderr, if that is a terminal (default: shown)",
    )
    _config(group)


def _inspect(parser: Parser) -> None:
    _network(parser)
    _data(parser, required=False)
    _example(parser)
    group = parser.add_argument_group("how to look")
    _forward(group)
    _ignore(group)
    _analysis_seconds(group)
    _config(group)


def _report(parser: Parser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="what singe prune --out wrote")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the page goes (default: beside the result)")


def _export(parser: Parser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="what singe prune --out wrote")
    parser.add_argument("--onnx", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--opset", type=int, metavar="N", help="version of the ONNX operators (default: torch's choice)"
    )
    parser.add_argument(
        "--dynamic-batch",
        action=argparse.BooleanOptionalAction,
        help="take any number of samples (default), or one only",
    )
    _network(parser, weights=False)
    _data(parser, required=False)
    _example(parser)
    group = parser.add_argument_group("other")
    _forward(group)
    _config(group)


def _nothing(parser: Parser) -> None:
    pass


_COMMANDS = {
    "prune": ("prune a trained network", _prune),
    "inspect": ("say what of a network can be pruned, and what cannot and why", _inspect),
    "report": ("write a page about a run, with plots", _report),
    "export": ("write a pruned network as ONNX", _export),
    "demo": ("train a small ResNet on handwritten digits, prune it, show what is left", _nothing),
    "info": ("print versions, what was built, and devices", _nothing),
}


# -- options that commands share -------------------------------------------------------------------------------


def _network(parser: Parser, weights: bool = True) -> None:
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--model", required=True, metavar="REF",
        help="package.module:factory, which makes the unpruned model; with arguments in brackets, such as "
        "models:resnet(depth=56)",
    )  # fmt: skip
    if weights:
        group.add_argument(
            "--weights",
            type=Path,
            metavar="FILE",
            help=".safetensors, or tensors of torch.save (default: the factory's)",
        )
    group.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")


def _data(parser: Parser, required: bool) -> None:
    group = parser.add_argument_group("the data")
    group.add_argument(
        "--data", required=required, metavar="REF",
        help="cifar10:DIR, the canonical binary files; imagefolder:DIR with folders train/ and maybe val/; or "
        "package.module:loader, which yields batches or is a function that returns a loader or (train, test)",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=_positive, metavar="N", help=f"of cifar10: and imagefolder: (default: {BATCH_SIZE})"
    )
    group.add_argument("--workers", type=int, metavar="N", help="processes that load images (default: none)")
    group.add_argument("--image-size", type=_positive, metavar="N", help=f"of imagefolder: (default: {IMAGE_SIZE})")


def _example(parser: Parser) -> None:
    group = parser.add_argument_group("instead of data")
    group.add_argument("--example", type=_shape, metavar="SHAPE", help="random inputs of this shape, such as 1,3,32,32")


def _ignore(group: Options) -> None:
    group.add_argument("--ignore", nargs="*", metavar="PATTERN", help="module names to leave whole, such as 'layer4.*'")


def _analysis_seconds(group: Options) -> None:
    what = "for trial removals" + _default("analysis_seconds")
    group.add_argument("--analysis-seconds", type=float, metavar="S", help=what)


def _forward(group: Options) -> None:
    group.add_argument("--forward", metavar="REF", help="package.module:function (model, batch) -> outputs")


def _config(group: Options) -> None:
    group.add_argument("--config", type=Path, metavar="FILE", help="TOML with the same names; the command line wins")


def _whole(group: Options, name: str, what: str) -> None:
    group.add_argument(_flag(name), type=int, metavar="N", help=what + _default(name))


def _literal(group: Options, name: str, kind: Any, what: str) -> None:
    group.add_argument(_flag(name), choices=get_args(kind), help=what + _default(name))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(name: str) -> str:
    return f" (default: {inspect.signature(prune).parameters[name].default})"


# -- kinds of values -------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]iB)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected bytes such as 1073741824, 512MiB or 1GiB, got {text!r}")
    return int(found[1]) * _UNITS[found[2] or ""]


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes such as 1,3,32,32, got {text!r}")
    return sizes
