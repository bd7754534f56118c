"""Flatness during training: measures of `steppe.flatness` on a fixed sample of a run's training images."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from steppe import flatness
from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.data.sampling import FLATNESS_SAMPLE, generator

_TOLERANCE = 1e-2  # of the eigenvalue, relative


def flatness_sample(split: Split, samples: int, seed: int) -> Split:
    """Draw `samples` images, or all where there are fewer, by `seed`: the same at every measurement of a run."""
    drawn = torch.randperm(len(split), generator=generator(seed, FLATNESS_SAMPLE))[:samples]
    drawn = drawn.sort().values.to(split.labels.device)
    return Split(split.images[drawn], split.labels[drawn])


def measure_flatness(network: nn.Module, sample: Split, rho: float, pause: Callable[[], None]) -> dict[str, float]:
    """Measure S(w) at `rho`, the Hessian's largest eigenvalue and the norm of the gradient: fields of `Record`.

    In evaluation mode and in the weights' own precision; the network and all generators are unchanged. All values are
    NaN if the loss is not finite. `pause()` is called after every pass over the sample.
    """
    objective = flatness.Objective(
        network,
        (normalize(sample.images), sample.labels),
        loss=F.cross_entropy,
        progress=lambda what, passes: pause(),
    )
    try:
        found = flatness.sharpness(objective, rho=rho, seed=0)
    except FloatingPointError:  # the run itself continues, and checks its loss
        return dict.fromkeys(("sharpness", "lambda_max", "gradient_norm"), math.nan)
    top = flatness.eigenvalues(flatness.Hessian(objective), k=1, tol=_TOLERANCE, seed=0)
    return {
        "sharpness": found.value,
        "lambda_max": float(top.values[0]),
        "gradient_norm": found.gradient_norm,
    }
