"""One pruning run of the demo's network with a checkpoint, to be killed: python reliability_run.py WEIGHTS DIR."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import singe
from singe import demo
from singe.digest import digest
from singe.graph.trace import named_tensors


def main(arguments: Sequence[str]) -> None:
    weights, directory = map(Path, arguments)
    torch.set_num_threads(1)
    model = demo.DigitNet()
    model.load_state_dict(load_file(weights))
    loader = DataLoader(demo.digits()[0], batch_size=64, shuffle=True)
    began = time.perf_counter()
    tuning = singe.FineTune(steps=300, when="layer", lr=0.02)
    result = singe.prune(model, loader, 0.5, finetune=tuning, images=64, progress=False, checkpoint=directory)
    text = json.dumps(result.plan.to_json())
    found = {"plan": digest(text, {}), "weights": digest("", named_tensors(result.model))}
    print(json.dumps({**found, "seconds": time.perf_counter() - began, "groups": len(result.history)}))


if __name__ == "__main__":
    main(sys.argv[1:])
