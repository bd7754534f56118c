"""The sample of Fashion-MNIST, the digits of scikit-learn, and the operations on data sets."""

from __future__ import annotations

import importlib.util
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fine_tuning import without

from steppe.cli import main
from steppe.experiments.data import datasets as data
from steppe.experiments.data.datasets import CLASSES, load, normalize
from steppe.experiments.errors import DataError


def test_sample_is_small_balanced_and_of_the_right_types() -> None:
    sample = load("sample")
    assert sample.name == "sample"
    for split in (sample.train, sample.test):
        assert split.images.shape == (3000, 1, 28, 28)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.labels.bincount().tolist() == [300] * len(CLASSES)
    assert len(sample.train) == len(sample.test) == 3000
    both = torch.cat([sample.train.images, sample.test.images]).flatten(1)
    assert len(both.unique(dim=0)) == 6000, "no image is there twice, and none in both splits"


def test_sample_that_was_loaded_may_be_written_to_without_changing_the_next_load() -> None:
    first = load("sample")
    before = first.train.images.clone()
    first.train.images.zero_()
    first.train.labels.zero_()
    second = load("sample")
    assert torch.equal(second.train.images, before)
    assert second.train.labels.any()


def packaged() -> bytes:
    return (Path(data.__file__).parent / "sample" / data.SAMPLE).read_bytes()


def flipped(good: bytes) -> bytes:
    middle = len(good) // 2
    return good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]


def without_labels(good: Path) -> None:
    with np.load(good) as archive:
        kept = {name: archive[name] for name in archive if name != "train_labels"}
    np.savez_compressed(good, **kept)


def with_one_other_label(good: Path) -> None:
    with np.load(good) as archive:
        arrays = dict(archive)
    arrays["test_labels"][0] ^= 1
    np.savez_compressed(good, **arrays)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (Path.unlink, "missing or damaged"),
        (lambda path: path.write_bytes(b""), "missing or damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "missing or damaged"),
        (lambda path: path.write_bytes(flipped(path.read_bytes())), "missing or damaged"),
        (without_labels, "missing or damaged"),
        (with_one_other_label, "SHA-256"),
    ],
)
def test_damaged_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], Any], says: str
) -> None:
    path = tmp_path / "sample" / data.SAMPLE
    path.parent.mkdir()
    path.write_bytes(packaged())
    monkeypatch.setattr(data.resources, "files", lambda _: tmp_path)
    assert len(load("sample").train) == 3000, "unspoilt, it loads from here"
    spoil(path)
    with pytest.raises(DataError, match=says) as caught:
        load("sample")
    assert str(path) in str(caught.value)
    assert "Install Steppe again" in str(caught.value)


def test_sample_archive_has_no_dates() -> None:
    with zipfile.ZipFile(Path(data.__file__).parent / "sample" / data.SAMPLE) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert [info.filename for info in archive.infolist()] == [f"{name}.npy" for name in data.SAMPLE_ARRAYS]
    assert len(packaged()) < 4_000_000


def test_sample_with_a_directory_and_unknown_names_raise(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is part of this clone of Steppe"):
        load("sample", tmp_path)
    with pytest.raises(DataError, match="no dataset 'mnist': choose one of sample, fashion-mnist"):
        load("mnist")  # type: ignore[arg-type]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation from the wheel, which has no folder of the sample."""
    monkeypatch.setattr(data.resources, "files", lambda _: tmp_path / "site-packages")


def made_of_the_sample() -> data.Dataset:
    """A full set whose first images of each class are those of the sample; the rest are others."""
    sample = load("sample")
    more = torch.arange(10).repeat(3)
    splits = (
        data.Split(
            torch.cat([part.images, torch.full((30, 1, 28, 28), 7, dtype=torch.uint8)]), torch.cat([part.labels, more])
        )
        for part in (sample.train, sample.test)
    )
    return data.Dataset("fashion-mnist", *splits, "a folder")


def test_wheel_cuts_the_same_sample_out_of_the_full_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    full, packaged_sample = made_of_the_sample(), load("sample")
    asked: list[Path | None] = []
    monkeypatch.setattr(data, "_load_full", lambda data_dir: asked.append(data_dir) or full)
    request.getfixturevalue("wheel")
    sample = load("sample", tmp_path)
    assert asked == [tmp_path]
    for ours, theirs in ((sample.train, packaged_sample.train), (sample.test, packaged_sample.test)):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert (sample.name, sample.source) == ("sample", "the sample, cut out of a folder")
    monkeypatch.setattr(data, "SAMPLE_PER_CLASS", 301)
    with pytest.raises(DataError, match=r"cut out of a folder is not that of this version: the SHA-256"):
        load("sample")


@pytest.mark.usefixtures("wheel")
def test_wheel_without_the_full_set_says_how_to_get_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPPE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="not in the wheel of Steppe") as caught:
        load("sample")
    assert str(tmp_path) in str(caught.value)
    assert main(["compare", "demo", "--out", str(tmp_path / "run"), "--seeds", "1", "--runs-at-once", "1"]) == 1
    printed = capsys.readouterr().err
    assert "apt install dataset-fashion-mnist" in printed
    assert "pip install --editable '.[experiments]'" in printed


def test_to_moves_both_splits_and_keeps_the_rest() -> None:
    sample = load("sample")
    moved = sample.to("meta")
    for split in (moved.train, moved.test):
        assert split.images.device.type == split.labels.device.type == "meta"
    assert (moved.name, moved.source) == (sample.name, sample.source)
    assert sample.train.images.device.type == "cpu"
    assert len(moved.train) == 3000


def test_normalize_is_the_formula_and_leaves_the_images_unchanged() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    result = normalize(images)
    expected = (np.arange(256) / 255 - 0.2860) / 0.3530
    assert result.dtype == torch.float32
    assert result.shape == images.shape
    np.testing.assert_allclose(result.numpy().ravel(), expected, rtol=1e-5, atol=1e-6)
    assert images.flatten().tolist() == list(range(256))


def test_normalize_twice_raises() -> None:
    with pytest.raises(TypeError, match=r"torch.float32.*normalized before"):
        normalize(normalize(torch.zeros(1, dtype=torch.uint8)))


@pytest.fixture(scope="module")
def full() -> data.Dataset:
    if not (os.environ.get("STEPPE_DATA") or data.SYSTEM.is_dir()):
        pytest.skip("Fashion-MNIST is not here: `apt install dataset-fashion-mnist`, or set $STEPPE_DATA")
    return load("fashion-mnist")


@pytest.mark.full_data
def test_full_set_has_the_published_facts(full: data.Dataset) -> None:
    assert full.train.images.shape == (60_000, 1, 28, 28)
    assert full.test.images.shape == (10_000, 1, 28, 28)
    assert full.train.labels.bincount().tolist() == [6000] * 10
    assert full.test.labels.bincount().tolist() == [1000] * 10
    assert [CLASSES[label] for label in full.train.labels[:3]] == ["Ankle boot", "T-shirt/top", "T-shirt/top"]


@pytest.mark.full_data
def test_mean_and_std_are_those_of_the_training_pixels(full: data.Dataset) -> None:
    counts = np.bincount(full.train.images.numpy().ravel(), minlength=256).astype(np.float64)
    values = np.arange(256) / 255
    mean = (counts * values).sum() / counts.sum()
    std = np.sqrt((counts * (values - mean) ** 2).sum() / counts.sum())
    assert round(mean, 4) == data.MEAN
    assert round(std, 4) == data.STD
    pixels = normalize(full.train.images[:5000])
    assert abs(pixels.mean().item()) < 0.01
    assert abs(pixels.std().item() - 1) < 0.01


@pytest.mark.full_data
@pytest.mark.parametrize("part", ["train", "test"])
def test_sample_is_the_first_of_each_class_of_the_same_split(full: data.Dataset, part: str) -> None:
    whole, sample = getattr(full, part), getattr(load("sample"), part)
    seen = [0] * len(CLASSES)
    chosen: list[int] = []
    for index, label in enumerate(whole.labels.tolist()):
        if seen[label] < 300:
            seen[label] += 1
            chosen.append(index)
    assert torch.equal(sample.images, whole.images[chosen])
    assert torch.equal(sample.labels, whole.labels[chosen])


@pytest.mark.full_data
def test_the_script_makes_the_packaged_sample_and_the_same_bytes_twice(
    full: data.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[3] / "scripts" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", script)
    assert spec is not None
    assert spec.loader is not None
    make_sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_sample)
    monkeypatch.setattr(make_sample, "load", lambda _: full)
    assert make_sample.main(tmp_path / "a") is None
    assert make_sample.main(tmp_path / "b") is None
    assert (tmp_path / "a" / data.SAMPLE).read_bytes() == (tmp_path / "b" / data.SAMPLE).read_bytes()
    full_with_one_pixel_changed = replace(full, test=data.Split(full.test.images ^ 1, full.test.labels))
    monkeypatch.setattr(make_sample, "load", lambda _: full_with_one_pixel_changed)
    assert "SAMPLE_SHA256" in make_sample.main(tmp_path / "c")


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return load("digits")


def test_digits_are_scikit_learns_with_one_in_three_of_each_class_for_testing(digits: data.Dataset) -> None:
    from sklearn.datasets import load_digits  # the truth, read by another path

    loaded = load_digits()
    assert (len(digits.train), len(digits.test)) == (1201, 596)
    images = torch.cat([digits.train.images, digits.test.images])
    assert (images.dtype, images.shape[1:]) == (torch.uint8, (1, 28, 28))
    for label in range(10):
        of_class = torch.from_numpy(loaded.images[loaded.target == label])
        test = digits.test.images[digits.test.labels == label]
        wanted = F.interpolate(of_class[2::3].unsqueeze(1), (28, 28), mode="bilinear") * (255 / 16)
        assert (test.double() - wanted).abs().max() <= 0.5
        assert len(digits.train.labels[digits.train.labels == label]) == len(of_class) - len(of_class) // 3
    assert torch.bincount(images.flatten(1).max(1).values.long())[:128].sum() == 0  # every image is scaled to 0..255


def test_digits_with_another_checksum_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DIGITS_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits of this scikit-learn are not those .* Install scikit-learn again"):
        load("digits")


def test_missing_scikit_learn_is_reported_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("sklearn", monkeypatch)
    assert main(["finetune", "--backbone", "none", "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'steppe[finetune]'" in capsys.readouterr().err
