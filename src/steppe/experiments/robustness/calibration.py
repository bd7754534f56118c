"""Calibration of predicted probabilities.

References:
    Guo, Pleiss, Sun and Weinberger 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599.
    Brier 1950, Verification of Forecasts Expressed in Terms of Probability, Monthly Weather Review 78.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """How far predicted probabilities are from what happened; all are 0 for certain and correct predictions."""

    error: float
    """The expected calibration error, from 0 to 1."""
    negative_log_likelihood: float
    brier_score: float
    """Mean squared distance from the probabilities to the one-hot labels, summed over the classes, from 0 to 2."""


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """Measure the calibration of logits, (n, classes), against labels, (n,).

    The expected calibration error is the mean over all samples of |accuracy - mean confidence| of the sample's bin: of
    `bins` intervals of equal width, (i / bins, (i + 1) / bins], that the largest probability falls into. Computed in
    float64. Logits that are not finite make every measure NaN.

    Example:
        >>> calibration(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])).error
        0.0
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or 0 in logits.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}: (n, classes) and (n,) "
            "are needed, each at least 1"
        )
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        raise ValueError(f"labels must be whole numbers from 0 to {logits.shape[1] - 1}, the classes of the logits")
    if bins < 1:
        raise ValueError(f"bins={bins}: the number of intervals of the confidence must be at least 1")
    logits = logits.detach().double()
    if not bool(logits.isfinite().all()):
        return Calibration(torch.nan, torch.nan, torch.nan)
    labels = labels.to(logits.device).long()
    log_probabilities = logits.log_softmax(1)
    probabilities = log_probabilities.exp()
    one_hot = torch.zeros_like(logits).scatter_(1, labels[:, None], 1.0)
    return Calibration(
        error=_expected_error(probabilities, labels, bins),
        negative_log_likelihood=float(-log_probabilities.gather(1, labels[:, None]).mean()) + 0.0,  # and not -0.0
        brier_score=float((probabilities - one_hot).square().sum(1).mean()),
    )


def _expected_error(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    confidence, predicted = probabilities.max(1)
    edges = torch.arange(1, bins, dtype=torch.float64, device=labels.device) / bins
    position = torch.bucketize(confidence, edges)
    excess = (predicted == labels).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64, device=labels.device).index_add_(0, position, excess)
    return float(sums.abs().sum() / len(labels))
