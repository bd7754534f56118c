"""Steppe: sharpness-aware minimisation for PyTorch."""

from steppe import closures, compat, flatness, methods, modifiers, rho_schedule, rules, testing, variants
from steppe._engine.side_effects import frozen_stats
from steppe.ascent import Steps
from steppe.cadences import Every, GradientNorm, Late, Randomly
from steppe.combinations import PenalizedNorm, Perturbed, Reuse, SurrogateGap, Weighted
from steppe.modifiers import DynamicSparse, Masked, Only, Sparse, Stochastic, last_layers, layers, norm_layers
from steppe.papers import citation
from steppe.perturbations import (
    L2,
    Adaptive,
    Fisher,
    Friendly,
    LayerWise,
    LInf,
    Momentum,
    Random,
    VarianceSuppressed,
    ZScore,
)
from steppe.rules import Ascent, Cadence, Combination, Perturbation, Point
from steppe.sam import SAM, Walk
from steppe.trajectory_loss import MESA, SAF

__version__ = "0.1.0"

__all__ = [
    "L2",
    "MESA",
    "SAF",
    "SAM",
    "Adaptive",
    "Ascent",
    "Cadence",
    "Combination",
    "DynamicSparse",
    "Every",
    "Fisher",
    "Friendly",
    "GradientNorm",
    "LInf",
    "Late",
    "LayerWise",
    "Masked",
    "Momentum",
    "Only",
    "PenalizedNorm",
    "Perturbation",
    "Perturbed",
    "Point",
    "Random",
    "Randomly",
    "Reuse",
    "Sparse",
    "Steps",
    "Stochastic",
    "SurrogateGap",
    "VarianceSuppressed",
    "Walk",
    "Weighted",
    "ZScore",
    "citation",
    "closures",
    "compat",
    "flatness",
    "frozen_stats",
    "last_layers",
    "layers",
    "methods",
    "modifiers",
    "norm_layers",
    "rho_schedule",
    "rules",
    "testing",
    "variants",
]
