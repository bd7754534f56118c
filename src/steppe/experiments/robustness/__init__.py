"""Measures of a trained image classifier: corrupted images, calibration, rounded weights, forgetting.

Weights are rounded by :func:`steppe.flatness.round_weights`.
"""

from steppe.experiments.robustness.calibration import Calibration, calibration
from steppe.experiments.robustness.corruptions import CORRUPTIONS, Corruption, corrupt
from steppe.experiments.robustness.forgetting import Forgetting, forgetting
from steppe.experiments.robustness.measurement import measure
from steppe.experiments.robustness.second_tasks import inverted, of_classes, rotated

__all__ = [
    "CORRUPTIONS",
    "Calibration",
    "Corruption",
    "Forgetting",
    "calibration",
    "corrupt",
    "forgetting",
    "inverted",
    "measure",
    "of_classes",
    "rotated",
]
