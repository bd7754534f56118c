"""One method that combines several cheaper perturbations: ``preset:interval=2,fraction=0.25,...``."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from steppe import L2, SAM, Adaptive, ParameterSubset
from steppe.experiments.config import methods
from steppe.experiments.config.methods import Method
from steppe.methods.fraction_sam import FractionSAMStep
from steppe.methods.looksam import GradientReuse
from steppe.rules import Point
from steppe.rules.perturbed_gradient import PerturbedGradient
from steppe.rules.subsets import norm_layers


@dataclass(frozen=True)
class LatePeriodic:
    """Perturb once per interval, from the fraction ``start`` of the training on."""

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    interval: int
    start: float
    total_steps: int

    def __call__(self, point: Point) -> bool:
        """Return True if the step perturbs."""
        return point.step % self.interval == 0 and point.step / self.total_steps >= self.start


def preset(
    base: Optimizer,
    *,
    rho: float,
    model: nn.Module,
    total_steps: int,
    start: float = 0.0,
    interval: int = 1,
    reuse: float = 0.0,
    norms: bool = False,
    adaptive: bool = False,
) -> SAM:
    """Build SAM with late or periodic perturbations, of the normalization layers only, or reusing g_v in between."""
    rule = Adaptive() if adaptive else L2()
    perturbation = ParameterSubset(rule, norm_layers(model)) if norms else rule
    combination = GradientReuse(reuse) if reuse else PerturbedGradient()
    cadence = LatePeriodic(interval, start, total_steps)
    return SAM(base, rho, model=model, perturbation=perturbation, combination=combination, cadence=cadence)


def passes(start: float, interval: int, fraction: float) -> Fraction:
    """Return the planned passes per step."""
    return 1 + (1 - Fraction(start)) * Fraction(fraction) / interval


class OptionalFraction(FractionSAMStep):
    """Compute the perturbation on a fraction of the batch, by default on the whole batch."""

    def __init__(self, optimizer: SAM, fraction: float = 1.0) -> None:
        super().__init__(optimizer, fraction)


def register() -> None:
    """Add the method ``preset`` to those that a recipe can have."""
    own = Method("combined cheaper perturbations", preset, passes, OptionalFraction, label="Preset")
    methods.METHODS = {**methods.METHODS, "preset": own}
