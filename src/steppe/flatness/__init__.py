"""Is the minimum really flatter? Sharpness, the Hessian's spectrum and the landscape, for any model."""

from steppe.flatness.average import average_sharpness
from steppe.flatness.connect import Curve, connect
from steppe.flatness.directions import between, random_directions
from steppe.flatness.eigen import Eigenpairs, eigenvalues
from steppe.flatness.landscape import Landscape, Line, interpolation, landscape
from steppe.flatness.measure import FAMILIES, Budget, Family, Flatness, Measure, measure, normalized_logits
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Block, Hessian, Operator, Scaled
from steppe.flatness.relative import relative_flatness
from steppe.flatness.sharpness import MSharpness, Sharpness, m_sharpness, sharpness
from steppe.flatness.spectrum import Density, density, trace
from steppe.flatness.stability import edge_of_stability, sam_edge_of_stability
from steppe.flatness.values import Estimate

__all__ = [
    "FAMILIES",
    "Block",
    "Budget",
    "Curve",
    "Density",
    "Eigenpairs",
    "Estimate",
    "Family",
    "Flatness",
    "Hessian",
    "Landscape",
    "Line",
    "MSharpness",
    "Measure",
    "Objective",
    "Operator",
    "Scaled",
    "Sharpness",
    "average_sharpness",
    "between",
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
    "sam_edge_of_stability",
    "sharpness",
    "trace",
]
