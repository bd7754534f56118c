from pathlib import Path

import pytest
import torch

from steppe.experiments.config.presets import RECIPES
from steppe.experiments.data.datasets import Dataset, load
from steppe.experiments.data.few_shot import few_shot
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.run_folder import RunFolder


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return load("digits")


def test_few_shots_are_stratified_seeded_and_nested(whole: Dataset) -> None:
    seven, three, other = (few_shot(whole.train, shots, seed) for shots, seed in ((7, 0), (3, 0), (7, 1)))
    assert torch.equal(torch.bincount(seven.labels), torch.full((10,), 7))
    keys = [{image.numpy().tobytes() for image in s.images} for s in (seven, three, other, whole.test, whole.train)]
    assert len(keys[0]) == 70
    assert keys[1] < keys[0]
    assert keys[0] <= keys[4]
    assert not keys[0] & keys[3]
    assert keys[0] != keys[2]
    again = few_shot(whole.train, 7, 0)
    assert torch.equal(again.images, seven.images)
    assert torch.equal(again.labels, seven.labels)
    for image, label in zip(seven.images, seven.labels, strict=True):  # each keeps its own label
        at = (whole.train.images == image).flatten(1).all(1).nonzero()[0]
        assert whole.train.labels[at] == label
    with pytest.raises(ExperimentError, match=r"shots=900: class 0 has 119 training images.*--shots 119 or fewer"):
        few_shot(whole.train, 900, 0)


def test_run_folder_rejects_another_number_of_shots(tmp_path: Path) -> None:
    demo = RECIPES["demo"][0]
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(demo, 1)
    with pytest.raises(ExperimentError, match=r"holds another configuration.*: shots was None and is 3\. Use"):
        folder.claim(demo.replace(shots=3), 1)
