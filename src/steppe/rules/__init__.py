"""The extension interface: what a rule sees, the three protocols, and the rules that methods share."""

from steppe.rules import ops
from steppe.rules.ascent_steps import Steps
from steppe.rules.every import Every
from steppe.rules.l2 import L2
from steppe.rules.linf import LInf
from steppe.rules.masks import Masked
from steppe.rules.perturbed import Perturbed
from steppe.rules.protocols import (
    Ascent,
    Cadence,
    Combination,
    Memory,
    Perturbation,
    Point,
    climbs,
    needs_gradient,
    scale_free,
)
from steppe.rules.subsets import Modifier, Only, last_layers, layers, norm_layers

__all__ = [
    "L2",
    "Ascent",
    "Cadence",
    "Combination",
    "Every",
    "LInf",
    "Masked",
    "Memory",
    "Modifier",
    "Only",
    "Perturbation",
    "Perturbed",
    "Point",
    "Steps",
    "climbs",
    "last_layers",
    "layers",
    "needs_gradient",
    "norm_layers",
    "ops",
    "scale_free",
]
