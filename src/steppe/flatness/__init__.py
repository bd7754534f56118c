"""Is the minimum really flatter? Sharpness, the Hessian's spectrum and the landscape, for any model."""

from steppe.flatness.eigen import Eigenpairs, eigenvalues
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Block, Hessian, Operator, Scaled
from steppe.flatness.spectrum import Density, density, trace
from steppe.flatness.values import Estimate

__all__ = [
    "Block",
    "Density",
    "Eigenpairs",
    "Estimate",
    "Hessian",
    "Objective",
    "Operator",
    "Scaled",
    "density",
    "eigenvalues",
    "trace",
]
