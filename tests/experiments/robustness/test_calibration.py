import math

import numpy as np
import pytest
import torch

from steppe.experiments.robustness.calibration import calibration


def reference(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> tuple[float, float, float]:
    """The definitions, sample by sample and bin by bin."""
    z, y = logits.double().numpy(), labels.numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    confidence, correct = p.max(1), p.argmax(1) == y
    error = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            error += inside.sum() / len(y) * abs(correct[inside].mean() - confidence[inside].mean())
    likelihood = -np.mean([math.log(p[n, y[n]]) for n in range(len(y))])
    brier = np.mean([sum((p[n, c] - (c == y[n])) ** 2 for c in range(p.shape[1])) for n in range(len(y))])
    return error, float(likelihood), float(brier)


def logits_of(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


@pytest.mark.parametrize("bins", [1, 2, 15, 100])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_measures_are_those_of_the_definition(bins: int, scale: float) -> None:
    draws = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(400, 7, generator=draws, dtype=torch.float64)
    labels = torch.randint(7, (400,), generator=draws)
    found = calibration(logits, labels, bins)
    error, likelihood, brier = reference(logits, labels, bins)
    assert found.error == pytest.approx(error, rel=1e-12)
    assert found.negative_log_likelihood == pytest.approx(likelihood, rel=1e-12)
    assert found.brier_score == pytest.approx(brier, rel=1e-12)


@pytest.mark.slow  # the import
def test_error_is_that_of_torchmetrics() -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    draws = torch.Generator().manual_seed(1)
    logits, labels = 2 * torch.randn(500, 5, generator=draws), torch.randint(5, (500,), generator=draws)
    theirs = functional.multiclass_calibration_error(logits.softmax(1), labels, num_classes=5, n_bins=15, norm="l1")
    assert calibration(logits, labels).error == pytest.approx(float(theirs), rel=1e-4)


def test_confidence_of_eight_tenths_at_an_accuracy_of_a_half_is_off_by_three_tenths() -> None:
    assert calibration(logits_of([0.8, 0.2], [0.8, 0.2]), torch.tensor([0, 1])).error == pytest.approx(0.3)


def test_too_much_and_too_little_confidence_do_not_cancel_in_different_bins() -> None:
    logits = logits_of([0.9, 0.1], [0.6, 0.4])
    assert calibration(logits, torch.tensor([1, 0])).error == pytest.approx((0.9 + 0.4) / 2)
    assert calibration(logits, torch.tensor([1, 0]), bins=1).error == pytest.approx(abs(0.5 - 0.75))


def test_a_confidence_at_an_edge_belongs_to_the_bin_below() -> None:
    # 0.5 and 0.4 are in one of five bins of width 0.1 if the edge belongs to the bin below, and cancel there
    logits = logits_of([0.5, 0.3, 0.2], [0.45, 0.3, 0.25])
    labels = torch.tensor([0, 1])
    probabilities = logits.softmax(1).max(1).values
    assert probabilities[0] == 0.5
    assert calibration(logits, labels, bins=10).error == pytest.approx(abs(1 - 0.95) / 2)


def test_certain_and_correct_predictions_score_zero() -> None:
    found = calibration(torch.tensor([[800.0, 0.0], [0.0, 800.0]]), torch.tensor([0, 1]))
    assert (found.error, found.negative_log_likelihood, found.brier_score) == (0.0, 0.0, 0.0)
    assert not math.copysign(1, found.negative_log_likelihood) < 0


def test_certain_and_wrong_predictions_score_finite_numbers() -> None:
    found = calibration(torch.tensor([[800.0, 0.0]]), torch.tensor([1]))
    assert (found.error, found.negative_log_likelihood, found.brier_score) == (1.0, 800.0, 2.0)


def test_a_single_class_is_always_certain() -> None:
    assert calibration(torch.randn(3, 1), torch.zeros(3, dtype=torch.int64)).error == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_make_every_measure_nan(value: float) -> None:
    found = calibration(torch.tensor([[value, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    assert all(math.isnan(measure) for measure in vars(found).values())


def test_half_precision_is_computed_in_double_precision() -> None:
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(64) % 5
    assert calibration(logits, labels) == calibration(logits.double(), labels)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), "at least 1"),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"\(n, classes\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"\(n, classes\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "from 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0, -1]), "from 0 to 2"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "whole numbers"),
    ],
)
def test_logits_and_labels_that_do_not_belong_together_raise(
    logits: torch.Tensor, labels: torch.Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        calibration(logits, labels)


def test_no_bins_raise() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        calibration(torch.zeros(2, 3), torch.tensor([0, 1]), bins=0)
