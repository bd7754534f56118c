"""Make the small sample of Fashion-MNIST that is a file of the repository.

It has the first 300 images of each class of each split, in the order of the official files. Every run writes the same
bytes.

    python scripts/make_sample.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from steppe.experiments.data.datasets import SAMPLE, SAMPLE_SHA256, load, sample_digest, sample_of

PACKAGE = Path(__file__).parents[1] / "src" / "steppe" / "experiments" / "data" / "sample"


def main(directory: Path) -> str | None:
    full = load("fashion-mnist")
    arrays = sample_of(full)
    path = directory / SAMPLE
    directory.mkdir(parents=True, exist_ok=True)
    # numpy stamps every member with 1980-01-01, so the archive does not depend on the date
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    digest = sample_digest(arrays)
    print(f"{path}: {path.stat().st_size:,} bytes from {full.source}\nSHA-256 of the content: {digest}")
    if digest != SAMPLE_SHA256:
        return "SAMPLE_SHA256 in steppe/experiments/data/datasets.py differs; if the change is intended, update it"
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE))
