"""Scikit-learn's handwritten digits: 1,797 gray images of 8 x 8 pixels, enlarged to the size of the other data sets.

References:
    E. Alpaydin and C. Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
    https://doi.org/10.24432/C50P49 (its test set, which is part of scikit-learn).
"""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from steppe.experiments.errors import DataError

SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"

_SIZE = 28
_TEST_ONE_IN = 3  # of each class, in the order of the file, so it is the same on every machine and for every seed


def read() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read the training and the test images, uint8 (n, 1, 28, 28), each with its labels, int64 (n,).

    Every third image of a class is a test image. Raises DataError when scikit-learn or its file is missing or damaged.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DataError(
            "scikit-learn is not installed, and the digits are part of it: pip install 'steppe[finetune]'"
        ) from error
    loaded = load_digits()
    images, labels = loaded.images.astype(np.uint8), loaded.target.astype(np.uint8)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if digest != SHA256:
        raise DataError(
            f"the digits of this scikit-learn are not those that Steppe knows: their SHA-256 is {digest} and not "
            f"{SHA256}, and results from them could not be compared. Install scikit-learn again."
        )
    enlarged, known = _enlarge(torch.from_numpy(images)), torch.from_numpy(labels.astype(np.int64))
    test = torch.zeros(len(known), dtype=torch.bool)
    for label in range(10):
        test[(known == label).nonzero().flatten()[_TEST_ONE_IN - 1 :: _TEST_ONE_IN]] = True
    return (enlarged[~test], known[~test]), (enlarged[test], known[test])


def _enlarge(images: Tensor) -> Tensor:
    """Convert 0..16 on 8 x 8 pixels to 0..255 on 28 x 28."""
    # in float64, whose rounding differences between machines do not reach the bytes
    large = F.interpolate(images.unsqueeze(1).double(), (_SIZE, _SIZE), mode="bilinear", align_corners=False)
    return large.mul(255 / 16).round().to(torch.uint8)
