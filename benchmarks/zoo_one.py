"""One model of the zoo with one tool, in the process that zoo.py starts. Prints a line of JSON per finding.

python benchmarks/zoo_one.py singe own/unet
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import warnings
from collections.abc import Sequence

import torch
import zoo_peer
import zoo_singe
from zoo_checks import described
from zoo_models import MODELS

TOOLS = {"singe": zoo_singe.measure, "torch_pruning": zoo_peer.measure}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--memory", type=int, help="limit of address space in bytes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    if options.memory:
        resource.setrlimit(resource.RLIMIT_AS, (options.memory, options.memory))
    torch.set_num_threads(options.threads)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # models and tools print, too
    warnings.simplefilter("ignore")
    try:
        for key, finding in TOOLS[options.tool](options.model):
            print(json.dumps({key: finding}), file=out, flush=True)
    except Exception as error:  # such as a model that cannot be built
        print(json.dumps({"problem": described(error)}), file=out, flush=True)


if __name__ == "__main__":
    main()
