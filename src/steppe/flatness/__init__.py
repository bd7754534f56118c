"""Measure how flat a minimum is: sharpness, the Hessian's spectrum and the loss landscape, for any model.

An :class:`Objective` is the loss over data as a function of the weights. All measures take one, or an operator made of
it, such as its :class:`Hessian`. :func:`measure` evaluates all of them. Only the names listed here are public.
"""

from steppe.flatness.after_change import LossChange, TrainingChange, after_rounding, after_training
from steppe.flatness.average_sharpness import average_sharpness
from steppe.flatness.batch_sharpness import batch_sharpness
from steppe.flatness.budget import Budget
from steppe.flatness.by_layer import LayerCurvature, LayerTable, by_layer
from steppe.flatness.directions import between, random_directions
from steppe.flatness.eigenvalues import Eigenpairs, eigenvalues
from steppe.flatness.empirical_fisher import EmpiricalFisher
from steppe.flatness.estimate import Estimate
from steppe.flatness.families import FAMILIES, Family, Measure
from steppe.flatness.finite_differences import FiniteDifferenceHessian
from steppe.flatness.gauss_newton import GaussNewton
from steppe.flatness.interpolation import Line, interpolation
from steppe.flatness.landscape import Landscape, landscape
from steppe.flatness.m_sharpness import MSharpness, m_sharpness
from steppe.flatness.measure import measure
from steppe.flatness.mode_connectivity import Curve, connect
from steppe.flatness.normalized_logits import normalized_logits
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Block, Hessian, Operator, Scaled
from steppe.flatness.preconditioner import adam_preconditioner
from steppe.flatness.quantization import round_weights, rounded
from steppe.flatness.relative_flatness import relative_flatness
from steppe.flatness.result import Flatness
from steppe.flatness.sharpness import Sharpness, sharpness
from steppe.flatness.spectral_density import Density, density
from steppe.flatness.stability import adam_edge_of_stability, edge_of_stability, sam_edge_of_stability
from steppe.flatness.trace import trace

__all__ = [
    "FAMILIES",
    "Block",
    "Budget",
    "Curve",
    "Density",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "Family",
    "FiniteDifferenceHessian",
    "Flatness",
    "GaussNewton",
    "Hessian",
    "Landscape",
    "LayerCurvature",
    "LayerTable",
    "Line",
    "LossChange",
    "MSharpness",
    "Measure",
    "Objective",
    "Operator",
    "Scaled",
    "Sharpness",
    "TrainingChange",
    "adam_edge_of_stability",
    "adam_preconditioner",
    "after_rounding",
    "after_training",
    "average_sharpness",
    "batch_sharpness",
    "between",
    "by_layer",
    "connect",
    "density",
    "edge_of_stability",
    "eigenvalues",
    "interpolation",
    "landscape",
    "m_sharpness",
    "measure",
    "normalized_logits",
    "random_directions",
    "relative_flatness",
    "round_weights",
    "rounded",
    "sam_edge_of_stability",
    "sharpness",
    "trace",
]
