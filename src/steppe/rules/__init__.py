"""The extension interface: three protocols, the ``Point`` that a rule gets, and the rules that methods share."""

from steppe.rules import ops
from steppe.rules.ascent_steps import AscentSteps
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from steppe.rules.masks import Masked
from steppe.rules.mixed_gradient import MixedGradient
from steppe.rules.modifier import Modifier
from steppe.rules.periodic import Periodic
from steppe.rules.perturbed_gradient import PerturbedGradient
from steppe.rules.protocols import (
    Cadence,
    Combination,
    Memory,
    Perturbation,
    Point,
    ScaledDirection,
    ascent_steps,
    averages_memory,
    follows_gradient,
    needs_gradient,
    scale_free,
)
from steppe.rules.subsets import ParameterSubset, last_layers, layers, norm_layers

__all__ = [
    "L2",
    "AscentSteps",
    "Cadence",
    "Combination",
    "LInf",
    "Masked",
    "Memory",
    "MixedGradient",
    "Modifier",
    "ParameterSubset",
    "Periodic",
    "Perturbation",
    "PerturbedGradient",
    "Point",
    "ScaledDirection",
    "ascent_steps",
    "averages_memory",
    "follows_gradient",
    "last_layers",
    "layers",
    "needs_gradient",
    "norm_layers",
    "ops",
    "scale_free",
]
