import pytest
import torch
from tiny import dataset

from steppe.experiments.data.datasets import load
from steppe.experiments.data.validation import hold_out
from steppe.experiments.errors import ExperimentError


def test_validation_set_is_disjoint_balanced_and_always_the_same() -> None:
    given = load("sample")
    one, two = hold_out(given, 6), hold_out(given, 6)
    assert torch.equal(one.test.images, two.test.images)
    assert len(one.train) == 2500
    assert one.test.labels.bincount().tolist() == [50] * 10
    # both together are the training images, each once
    rows = torch.cat([one.train.images, one.test.images]).flatten(1).unique(dim=0)
    assert torch.equal(rows, given.train.images.flatten(1).unique(dim=0))
    assert len(one.train) + len(one.test) == len(given.train)


def test_too_few_images_of_a_class_raise() -> None:
    with pytest.raises(ExperimentError, match="none can be held out"):
        hold_out(dataset(train=10), 60)
