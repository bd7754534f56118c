"""Make the small sample of Fashion-MNIST that is packaged with Steppe.

It has the first 300 images of each class of each split, in the order of the official files. That order is already
shuffled, so the rule needs no seed. Every run writes the same bytes.

    python scripts/make_sample.py [DIRECTORY]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from steppe.experiments.data.datasets import CLASSES, SAMPLE, SAMPLE_SHA256, Split, load, sample_digest

PER_CLASS = 300
PACKAGE = Path(__file__).parents[1] / "src" / "steppe" / "experiments" / "data" / "sample"


def first_of_each_class(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the indices, ascending, of the first `count` examples of each class."""
    chosen = [np.flatnonzero(labels == label)[:count] for label in range(len(CLASSES))]
    return np.sort(np.concatenate(chosen))


def cut(split: Split) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the sample's images, uint8 (n, 28, 28), and labels, uint8 (n,), of one split."""
    labels = split.labels.numpy()
    index = first_of_each_class(labels, PER_CLASS)
    return split.images.numpy()[index, 0], labels[index].astype(np.uint8)


def main(directory: Path) -> str | None:
    full = load("fashion-mnist")
    arrays: dict[str, NDArray[np.uint8]] = {}
    arrays["train_images"], arrays["train_labels"] = cut(full.train)
    arrays["test_images"], arrays["test_labels"] = cut(full.test)
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
