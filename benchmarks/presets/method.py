"""The cheap climbs of the family in one method, so that they can be combined: ``preset:k=2,fraction=0.25,...``."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from steppe import L2, SAM, Adaptive, ParameterSubset
from steppe.experiments.config import methods
from steppe.experiments.config.methods import Method
from steppe.methods.fraction_sam import OnAFraction
from steppe.methods.looksam import GradientReuse
from steppe.rules import Point
from steppe.rules.perturbed import Perturbed
from steppe.rules.subsets import norm_layers


@dataclass(frozen=True)
class LateEvery:
    """Climb at every k-th step, from a fraction ``start`` of the training on."""

    needs_gradient: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    k: int
    start: float
    steps: int

    def __call__(self, point: Point) -> bool:
        """Return whether to climb."""
        return point.step % self.k == 0 and point.step / self.steps >= self.start


def preset(
    base: Optimizer,
    *,
    rho: float,
    model: nn.Module,
    steps: int,
    start: float = 0.0,
    k: int = 1,
    reuse: float = 0.0,
    norms: bool = False,
    adaptive: bool = False,
) -> SAM:
    """SAM that climbs late, at every k-th step, with the normalization layers only, reusing g_v between climbs."""
    rule = Adaptive() if adaptive else L2()
    perturbation = ParameterSubset(rule, norm_layers(model)) if norms else rule
    combination = GradientReuse(reuse) if reuse else Perturbed()
    cadence = LateEvery(k, start, steps)
    return SAM(base, rho, model=model, perturbation=perturbation, combination=combination, cadence=cadence)


def passes(start: float, k: int, fraction: float) -> Fraction:
    """Planned gradient evaluations for an image in a step."""
    return 1 + (1 - Fraction(start)) * Fraction(fraction) / k


class OnAPart(OnAFraction):
    """Climb on a fraction of the batch; on all of it where nothing is said."""

    def __init__(self, optimizer: SAM, fraction: float = 1.0) -> None:
        super().__init__(optimizer, fraction)


def register() -> None:
    """Let recipes name it."""
    own = Method("Preset", "cheap climbs together", preset, passes=passes, step_function=OnAPart)
    methods.METHODS = {**methods.METHODS, "preset": own}
