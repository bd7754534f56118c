from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fine_tuning import without

from steppe.cli import main
from steppe.experiments.data import digits
from steppe.experiments.data.datasets import Dataset, load
from steppe.experiments.errors import DataError


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return load("digits")


def test_digits_are_scikit_learns_with_one_in_three_of_each_class_for_testing(whole: Dataset) -> None:
    from sklearn.datasets import load_digits  # the truth, read by another path

    loaded = load_digits()
    assert (len(whole.train), len(whole.test)) == (1201, 596)
    images = torch.cat([whole.train.images, whole.test.images])
    assert (images.dtype, images.shape[1:]) == (torch.uint8, (1, 28, 28))
    for label in range(10):
        of_class = torch.from_numpy(loaded.images[loaded.target == label])
        test = whole.test.images[whole.test.labels == label]
        wanted = F.interpolate(of_class[2::3].unsqueeze(1), (28, 28), mode="bilinear") * (255 / 16)
        assert (test.double() - wanted).abs().max() <= 0.5
        assert len(whole.train.labels[whole.train.labels == label]) == len(of_class) - len(of_class) // 3
    assert torch.bincount(images.flatten(1).max(1).values.long())[:128].sum() == 0  # every image is scaled to 0..255


def test_digits_with_another_checksum_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"digits of this scikit-learn are not those .* Install scikit-learn again"):
        load("digits")


def test_missing_scikit_learn_is_reported_with_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without("sklearn", monkeypatch)
    assert main(["finetune", "--backbone", "none", "--out", str(tmp_path / "run")]) == 1
    assert "pip install 'steppe[finetune]'" in capsys.readouterr().err
