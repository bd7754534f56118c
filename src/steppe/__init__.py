"""Steppe: sharpness-aware minimization for PyTorch."""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; a test compares them with the table below
    from steppe import (
        averaging,
        closures,
        compat,
        flatness,
        integrations,
        methods,
        mup,
        rho_schedule,
        rules,
        testing,
        variants,
    )
    from steppe._engine.report import Report
    from steppe._engine.side_effects import frozen_stats
    from steppe.methods.aesam import GradientNormThreshold
    from steppe.methods.asam import Adaptive
    from steppe.methods.dynamic_sparse_sam import DynamicSparse
    from steppe.methods.esam import Stochastic
    from steppe.methods.fisher_sam import Fisher
    from steppe.methods.friendly_sam import Friendly
    from steppe.methods.gsam import SurrogateGap
    from steppe.methods.late_sam import LatePhase
    from steppe.methods.layerwise_sam import LayerWise
    from steppe.methods.le_sam import LossBudget
    from steppe.methods.looksam import GradientReuse
    from steppe.methods.mesa import MESA
    from steppe.methods.msam import Momentum
    from steppe.methods.pgn import PenalizedNorm
    from steppe.methods.random_sam import Bernoulli
    from steppe.methods.rwp import GaussianNoise
    from steppe.methods.saf import SAF
    from steppe.methods.sagm import GradientMatching
    from steppe.methods.saner import DownWeighted
    from steppe.methods.sparse_sam import Sparse
    from steppe.methods.stable_sam import Renormalized
    from steppe.methods.stale_sam import KeptGradient, StaleGradient
    from steppe.methods.unified_sam import PartlyNormalized
    from steppe.methods.vasso import VarianceSuppressed
    from steppe.methods.wsam import WeightedSharpness
    from steppe.methods.zsharp import ZScore
    from steppe.papers import citation
    from steppe.rules import Cadence, Combination, Perturbation, Point, ScaledDirection
    from steppe.rules.ascent_steps import AscentSteps
    from steppe.rules.l2 import L2
    from steppe.rules.linf import LInf
    from steppe.rules.masks import Masked
    from steppe.rules.mixed_gradient import MixedGradient
    from steppe.rules.periodic import Periodic
    from steppe.rules.perturbed_gradient import PerturbedGradient
    from steppe.rules.subsets import ParameterSubset, last_layers, layers, norm_layers
    from steppe.sam import SAM, Pass

__version__ = "0.2.0"

__all__ = [
    "L2",
    "MESA",
    "SAF",
    "SAM",
    "Adaptive",
    "AscentSteps",
    "Bernoulli",
    "Cadence",
    "Combination",
    "DownWeighted",
    "DynamicSparse",
    "Fisher",
    "Friendly",
    "GaussianNoise",
    "GradientMatching",
    "GradientNormThreshold",
    "GradientReuse",
    "KeptGradient",
    "LInf",
    "LatePhase",
    "LayerWise",
    "LossBudget",
    "Masked",
    "MixedGradient",
    "Momentum",
    "ParameterSubset",
    "PartlyNormalized",
    "Pass",
    "PenalizedNorm",
    "Periodic",
    "Perturbation",
    "PerturbedGradient",
    "Point",
    "Renormalized",
    "Report",
    "ScaledDirection",
    "Sparse",
    "StaleGradient",
    "Stochastic",
    "SurrogateGap",
    "VarianceSuppressed",
    "WeightedSharpness",
    "ZScore",
    "averaging",
    "citation",
    "closures",
    "compat",
    "flatness",
    "frozen_stats",
    "integrations",
    "last_layers",
    "layers",
    "methods",
    "mup",
    "norm_layers",
    "rho_schedule",
    "rules",
    "testing",
    "variants",
]

_LOADED_WHEN_USED = {
    "Adaptive": "steppe.methods.asam:Adaptive",
    "AscentSteps": "steppe.rules.ascent_steps:AscentSteps",
    "Bernoulli": "steppe.methods.random_sam:Bernoulli",
    "Cadence": "steppe.rules:Cadence",
    "Combination": "steppe.rules:Combination",
    "DownWeighted": "steppe.methods.saner:DownWeighted",
    "DynamicSparse": "steppe.methods.dynamic_sparse_sam:DynamicSparse",
    "Fisher": "steppe.methods.fisher_sam:Fisher",
    "Friendly": "steppe.methods.friendly_sam:Friendly",
    "GaussianNoise": "steppe.methods.rwp:GaussianNoise",
    "GradientMatching": "steppe.methods.sagm:GradientMatching",
    "GradientNormThreshold": "steppe.methods.aesam:GradientNormThreshold",
    "GradientReuse": "steppe.methods.looksam:GradientReuse",
    "KeptGradient": "steppe.methods.stale_sam:KeptGradient",
    "L2": "steppe.rules.l2:L2",
    "LInf": "steppe.rules.linf:LInf",
    "LatePhase": "steppe.methods.late_sam:LatePhase",
    "LayerWise": "steppe.methods.layerwise_sam:LayerWise",
    "LossBudget": "steppe.methods.le_sam:LossBudget",
    "MESA": "steppe.methods.mesa:MESA",
    "Masked": "steppe.rules.masks:Masked",
    "MixedGradient": "steppe.rules.mixed_gradient:MixedGradient",
    "Momentum": "steppe.methods.msam:Momentum",
    "ParameterSubset": "steppe.rules.subsets:ParameterSubset",
    "PartlyNormalized": "steppe.methods.unified_sam:PartlyNormalized",
    "Pass": "steppe.sam:Pass",
    "PenalizedNorm": "steppe.methods.pgn:PenalizedNorm",
    "Periodic": "steppe.rules.periodic:Periodic",
    "Perturbation": "steppe.rules:Perturbation",
    "PerturbedGradient": "steppe.rules.perturbed_gradient:PerturbedGradient",
    "Point": "steppe.rules:Point",
    "Renormalized": "steppe.methods.stable_sam:Renormalized",
    "Report": "steppe._engine.report:Report",
    "SAF": "steppe.methods.saf:SAF",
    "SAM": "steppe.sam:SAM",
    "ScaledDirection": "steppe.rules:ScaledDirection",
    "Sparse": "steppe.methods.sparse_sam:Sparse",
    "StaleGradient": "steppe.methods.stale_sam:StaleGradient",
    "Stochastic": "steppe.methods.esam:Stochastic",
    "SurrogateGap": "steppe.methods.gsam:SurrogateGap",
    "VarianceSuppressed": "steppe.methods.vasso:VarianceSuppressed",
    "WeightedSharpness": "steppe.methods.wsam:WeightedSharpness",
    "ZScore": "steppe.methods.zsharp:ZScore",
    "averaging": "steppe.averaging",
    "citation": "steppe.papers:citation",
    "closures": "steppe.closures",
    "compat": "steppe.compat",
    "flatness": "steppe.flatness",
    "frozen_stats": "steppe._engine.side_effects:frozen_stats",
    "integrations": "steppe.integrations",
    "last_layers": "steppe.rules.subsets:last_layers",
    "layers": "steppe.rules.subsets:layers",
    "methods": "steppe.methods",
    "mup": "steppe.mup",
    "norm_layers": "steppe.rules.subsets:norm_layers",
    "rho_schedule": "steppe.rho_schedule",
    "rules": "steppe.rules",
    "testing": "steppe.testing",
    "variants": "steppe.variants",
}
"""Where to find the names that are loaded when they are used, so that ``import steppe`` costs little.

The command line is started before torch is loaded, so it shows at once what takes seconds, and Ctrl-C is one line.
"""


def __getattr__(name: str) -> Any:
    if name not in _LOADED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = resolve_name(_LOADED_WHEN_USED[name])
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
