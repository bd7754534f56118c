"""The data sets of the experiments, as tensors: Fashion-MNIST, a small sample of it, and digits.

All are verified by SHA-256 each time they are read; a mismatch raises `DataError`.

References:
    Fashion-MNIST: Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747.
    Digits: E. Alpaydin and C. Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
    https://doi.org/10.24432/C50P49 (its test set, which is part of scikit-learn).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from steppe.experiments.data import fashion_mnist
from steppe.experiments.errors import DataError

DatasetName = Literal["sample", "fashion-mnist", "digits"]

CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
MEAN, STD = 0.2860, 0.3530  # over all pixels of the 60,000 training images, scaled to [0, 1]

SYSTEM = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
SAMPLE = "fashion-mnist-sample.npz"
SAMPLE_PER_CLASS = 300  # the first images of each class, of the training and of the test set
SAMPLE_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SAMPLE_SHA256 = "d4d999d034dc2dfc40859079e55859507f807b74ce581fe2146c137248085ff8"
DIGITS_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


@dataclass(frozen=True, eq=False)
class Split:
    """Images, uint8 (n, 1, 28, 28), and their labels, int64 (n,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))

    def select(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


class PretrainedNetwork(Protocol):
    """A network with pretrained weights."""

    def network(self, *, freeze: bool) -> nn.Module:
        """Return a copy with a new head; with `freeze`, only the head is trained."""

    def digest(self) -> str:
        """Return the SHA-256 of the weights."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split, with a description of their source, and the network that runs on it start from."""

    name: str
    train: Split
    test: Split
    source: str
    backbone: PretrainedNetwork | None = None
    """None: each run starts from its own random weights."""

    def to(self, device: torch.device | str) -> Dataset:
        return replace(self, train=self.train.to(device), test=self.test.to(device))


def load(name: DatasetName, data_dir: Path | None = None) -> Dataset:
    """Load a dataset: "fashion-mnist" (60,000 + 10,000 images), its "sample" (3,000 + 3,000), "digits" (1,201 + 596).

    The full set is read from the first of these that exists: `data_dir`, $STEPPE_DATA, the system's package, the
    user's cache; else it is downloaded into the cache. If one of the first two is given, no other is tried.

    The sample is a file of the repository. The wheel is small and has no images: there, the same sample is cut out of
    the full set.

    Raises DataError when the data is missing, damaged, or cannot be fetched or stored.

    >>> sample = load("sample")
    >>> sample.train.images.shape, sample.train.images.dtype
    (torch.Size([3000, 1, 28, 28]), torch.uint8)
    >>> CLASSES[sample.train.labels[0]]
    'Ankle boot'
    """
    if name == "fashion-mnist":
        return _load_full(data_dir)
    if name == "digits":  # data_dir is then for the pretraining of a backbone
        return _load_digits()
    if name != "sample":
        raise DataError(f"there is no dataset {name!r}: choose one of {', '.join(get_args(DatasetName))}")
    if not _sample_folder().is_dir():
        return _cut_out_sample(data_dir)
    if data_dir is not None:
        raise DataError(
            f"the sample is part of this clone of Steppe, so {data_dir} would be ignored: "
            'load "fashion-mnist" to read that directory, or leave the directory out'
        )
    return _load_sample()


def normalize(images: Tensor) -> Tensor:
    """Return (x / 255 - mean) / std in float32, for uint8 images x of any shape, on their device.

    >>> normalize(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([-0.8102,  2.0227])
    """
    if images.dtype != torch.uint8:
        raise TypeError(
            f"normalize() got {images.dtype} and not torch.uint8: the images were probably normalized before, and a "
            "second time would shift them. Pass the images as they were loaded."
        )
    return images.float().div_(255.0).sub_(MEAN).div_(STD)


def sample_of(full: Dataset) -> dict[str, NDArray[np.uint8]]:
    """Return the arrays of the sample: of each split of the full set, the first images of each class, in their order.

    That order is already shuffled, so the rule needs no seed.
    """
    arrays: dict[str, NDArray[np.uint8]] = {}
    for name, split in (("train", full.train), ("test", full.test)):
        labels = split.labels.numpy()
        of_classes = [np.flatnonzero(labels == label)[:SAMPLE_PER_CLASS] for label in range(len(CLASSES))]
        index = np.sort(np.concatenate(of_classes))
        arrays[f"{name}_images"] = split.images.numpy()[index, 0]
        arrays[f"{name}_labels"] = labels[index].astype(np.uint8)
    return arrays


def sample_digest(arrays: Mapping[str, NDArray[np.uint8]]) -> str:
    """Return the SHA-256 of the sample's content: names, shapes and values, independent of the archive format."""
    digest = hashlib.sha256()
    for name in SAMPLE_ARRAYS:
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def is_available(data_dir: Path | None = None) -> bool:
    """True if `load("fashion-mnist", data_dir)` can read from this machine without a download."""
    try:
        directory, origin = _directory(data_dir)
    except DataError:
        return False
    files = (*fashion_mnist.TRAIN, *fashion_mnist.TEST)
    return origin != "cache" or all(
        any((directory / f"{file.name}{packed}").exists() for packed in (".gz", "")) for file in files
    )


def cache_home() -> Path:
    """Return the folder of the user's caches; DataError if there is none."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:  # a container's user may have no home
        raise DataError(
            "Fashion-MNIST is not on this machine, and there is no place to keep a download: this user has no "
            f"home directory. Set $XDG_CACHE_HOME to a directory. {fashion_mnist.WAYS_OUT}"
        ) from error


def _directory(data_dir: Path | None) -> tuple[Path, str]:
    """Return the directory of the full set and its origin; all but the cache are read only."""
    if data_dir is not None:
        return Path(data_dir), "data_dir"
    if named := os.environ.get("STEPPE_DATA"):
        return Path(named), "$STEPPE_DATA"
    if SYSTEM.is_dir():
        return SYSTEM, "system package"
    return cache_home() / "steppe" / "fashion-mnist", "cache"


def _load_full(data_dir: Path | None) -> Dataset:
    directory, origin = _directory(data_dir)
    from_files = fashion_mnist.from_cache if origin == "cache" else fashion_mnist.from_directory
    read = partial(from_files, directory.expanduser())
    train, test = (_split(*map(read, files)) for files in (fashion_mnist.TRAIN, fashion_mnist.TEST))
    return Dataset("fashion-mnist", train, test, f"{directory} ({origin})")


def _sample_folder() -> Traversable:
    """Return the folder of the sample, which a clone and the source distribution have, and the wheel does not."""
    return resources.files("steppe.experiments.data") / "sample"


def _load_sample() -> Dataset:
    path = _sample_folder() / SAMPLE
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in SAMPLE_ARRAYS}
        digest = sample_digest(arrays)
    except Exception as error:  # zipfile and numpy raise many types on a damaged archive
        raise DataError(f"{path} is missing or damaged ({error}). Install Steppe again.") from error
    if digest != SAMPLE_SHA256:
        raise DataError(
            f"{path} is not the sample of this version: the SHA-256 of its content is {digest} and not "
            f"{SAMPLE_SHA256}, and results from it could not be compared. Install Steppe again."
        )
    return _as_sample(arrays, "the sample that is part of Steppe")


def _cut_out_sample(data_dir: Path | None) -> Dataset:
    try:
        full = _load_full(data_dir)
    except DataError as error:
        raise DataError(
            "the sample of Fashion-MNIST is not in the wheel of Steppe, and cannot be cut out of the full data set: "
            f"{error} Or install from a clone of the repository, which has the sample: "
            "pip install --editable '.[experiments]'"
        ) from error
    arrays = sample_of(full)
    if (digest := sample_digest(arrays)) != SAMPLE_SHA256:  # its files were verified, so the rule must have changed
        raise DataError(
            f"the sample cut out of {full.source} is not that of this version: the SHA-256 of its content is {digest} "
            f"and not {SAMPLE_SHA256}, and results from it could not be compared. Install Steppe again."
        )
    return _as_sample(arrays, f"the sample, cut out of {full.source}")


def _as_sample(arrays: Mapping[str, NDArray[np.uint8]], source: str) -> Dataset:
    train, test = (_split(arrays[f"{part}_images"], arrays[f"{part}_labels"]) for part in ("train", "test"))
    return Dataset("sample", train, test, source)


def _load_digits() -> Dataset:
    """Read the digits, and take every third image of a class for testing."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise DataError(
            "scikit-learn is not installed, and the digits are part of it: pip install 'steppe[finetune]'"
        ) from error
    loaded = load_digits()
    images, labels = loaded.images.astype(np.uint8), loaded.target.astype(np.uint8)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if digest != DIGITS_SHA256:
        raise DataError(
            f"the digits of this scikit-learn are not those that Steppe knows: their SHA-256 is {digest} and not "
            f"{DIGITS_SHA256}, and results from them could not be compared. Install scikit-learn again."
        )
    # from 0..16 on 8 x 8 pixels; in float64, whose rounding differences between machines do not reach the bytes
    pixels = torch.from_numpy(images).unsqueeze(1).double()
    enlarged = F.interpolate(pixels, (28, 28), mode="bilinear", align_corners=False).mul(255 / 16).round()
    whole = Split(enlarged.to(torch.uint8), torch.from_numpy(labels.astype(np.int64)))
    # in the order of the file, so it is the same on every machine and for every seed
    test = torch.zeros(len(whole), dtype=torch.bool)
    for label in range(10):
        test[(whole.labels == label).nonzero().flatten()[2::3]] = True
    return Dataset("digits", whole.select(~test), whole.select(test), "scikit-learn")


def _split(images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Split:
    # copied, because torch has no read-only tensors and both arrays may be views of immutable bytes
    return Split(torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))
