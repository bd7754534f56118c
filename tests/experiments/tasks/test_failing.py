"""Errors in the midst of a run name the samples that raise them."""

from pathlib import Path
from typing import Any

import pytest
from own_tasks import classifier, data, result
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from steppe.experiments import tune
from steppe.experiments.errors import ExperimentError
from steppe.experiments.tasks.task import Task


def damaged(*positions: int) -> tuple[Tensor, Tensor]:
    """Data in which the labels of some samples are out of range."""
    inputs, labels = data()
    labels[list(positions)] = 9
    return inputs, labels


def message(task: Task, folder: Path) -> str:
    with pytest.raises(ExperimentError) as error:
        result(task, folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"train": damaged(17)}, "with sample 17 of train, counted from 0"),
        ({"test": damaged(30, 40)}, "with samples 30, 40 of test, counted from 0"),
        ({"test": damaged(*range(20, 38))}, "with samples 20, 22, 24, 26, 28, ... of test, counted from 0"),
        ({"train": DataLoader(TensorDataset(*damaged(17)), 12, shuffle=True)}, "with sample 17 of train, counted"),
        ({"train": DataLoader(TensorDataset(*damaged(17)), batch_sampler=[range(12), range(12, 24)])}, "batch 1 of tr"),
    ],
)
def test_samples_are_named(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    found = message(classifier(evaluation_batch_size=24, **fields), tmp_path)
    assert "(IndexError: Target 9 is out of bounds)" in found
    assert named in found


class Limited(nn.Module):
    """Takes no batch of more than eight samples, whichever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > 8:
            raise ValueError("too many samples")
        return self.layer(inputs)  # type: ignore[no-any-return]


def test_batch_is_named_where_no_single_sample_raises_the_error(tmp_path: Path) -> None:
    found = message(classifier(model=Limited), tmp_path)
    assert "(ValueError: too many samples), at " in found
    assert ", with the batch of samples " in found
    assert found.endswith(", ... of train, counted from 0")


def test_sample_is_named_by_its_place_in_the_data_of_the_user_where_some_are_held_out(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    grid: dict[str, Any] = {"search": "rho=0.1,0.2", "sampler": "grid", "epochs": 1, "seeds": 1, "device": "cpu"}
    for position in (9, 40):
        task = classifier(train=damaged(position))
        with pytest.raises(ExperimentError, match=f"with sample {position} of train, counted from 0"):
            tune(task, ["sam"], hold_out=4, out=tmp_path / str(position), quiet=True, **grid)
