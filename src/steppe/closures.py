"""Closures and losses that decide what each pass evaluates: which samples, which loss, and which derivatives of it.

With a loss scaler, make the optimizer with ``scaler=scaler``: the closures scale their losses by it.
"""

from steppe.methods.bisam import bisam_loss, perturb_on
from steppe.methods.eigen_sam import update_eigenvector
from steppe.methods.esam import selected
from steppe.methods.fraction_sam import fraction
from steppe.methods.functional_sam import functional
from steppe.methods.micro_batch_sam import micro_batches
from steppe.methods.sassha import hessian_diagonal

__all__ = [
    "bisam_loss",
    "fraction",
    "functional",
    "hessian_diagonal",
    "micro_batches",
    "perturb_on",
    "selected",
    "update_eigenvector",
]
