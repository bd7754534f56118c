import pytest
import torch
from torch import nn

from steppe.experiments.data.datasets import MEAN, STD
from steppe.experiments.robustness.corruptions import CORRUPTIONS
from steppe.experiments.robustness.measurement import measure
from steppe.experiments.robustness.records import BITS, final_measures, measures_in


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))


def final(model: nn.Module) -> dict[str, float]:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 4, 4), generator=draws, dtype=torch.uint8)
    labels = torch.randint(10, (40,), generator=draws)
    found = final_measures(model, images, labels, lambda: None, mean=MEAN, std=STD)
    expected = measure(model, images, labels, mean=MEAN, std=STD, bits=BITS)
    assert found == {f"test_{name}": value for name, value in expected.items() if name != "accuracy"}
    return found


def test_each_recorded_measure_has_a_column_in_the_same_order_for_any_order_of_the_record(model: nn.Module) -> None:
    found = final(model)
    columns = [measure.name for measure in measures_in(found)]
    assert sorted(f"test_{name}" for name in columns) == sorted(found)
    assert columns[0] == "accuracy under corruptions"
    assert columns[1:7] == [f"accuracy under {name}" for name in CORRUPTIONS]
    assert columns[-2:] == ["accuracy at 4 bits", "accuracy at 3 bits"]
    assert measures_in(reversed(list(found))) == measures_in(found)


def test_clean_measures_are_no_columns() -> None:
    assert measures_in(["test_accuracy", "train_accuracy", "test_loss", "gap", "accuracy under blur"]) == []


def test_less_is_better_for_the_errors_of_probabilities_only(model: nn.Module) -> None:
    lower = {measure.name for measure in measures_in(final(model)) if not measure.higher_is_better}
    assert lower == {"calibration error", "negative log-likelihood", "Brier score"}


def test_other_severities_bits_and_corruptions_have_columns() -> None:
    names = ["test_accuracy at 16 bits", "test_accuracy under blur:5", "test_accuracy at 8 bits"]
    assert [measure.heading for measure in measures_in(names)] == ["16-bit\nweights", "8-bit\nweights", "blur:5"]
