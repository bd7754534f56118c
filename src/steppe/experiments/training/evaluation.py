"""Measure a network: loss and accuracy over a whole split, and flatness on a sample of the training images."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from steppe import flatness
from steppe.experiments.data.datasets import Split, normalize
from steppe.experiments.data.sampling import FLATNESS_SAMPLE, generator
from steppe.experiments.world import World

# Images in one forward pass; the number changes memory, speed and the last bits of a result.
_CHUNK, _CHUNK_ON_A_GPU = 500, 5000
_TOLERANCE = 1e-2  # of the largest eigenvalue, relative


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy, and accuracy in percent."""

    loss: float
    accuracy: float


def evaluate(
    network: nn.Module,
    split: Split,
    world: World,
    autocast: Callable[[], AbstractContextManager[object]],
    raise_if_stopped: Callable[[], None],
) -> Score:
    """Measure `network` on a split, shared out over the processes, with a call of `raise_if_stopped` before each chunk.

    The network is left in training mode.
    """
    share = world.share(len(split))
    images, labels = split.images[share], split.labels[share]
    sums = torch.zeros(2, dtype=torch.float64, device=labels.device)
    chunk = _CHUNK_ON_A_GPU if labels.is_cuda else _CHUNK
    network.eval()
    try:
        with torch.no_grad():
            for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
                raise_if_stopped()
                with autocast():
                    logits = network(normalize(x))
                sums[0] += F.cross_entropy(logits.float(), y, reduction="sum")
                sums[1] += (logits.argmax(1) == y).sum()
    finally:
        network.train()
    loss, correct = (world.total(sums) / len(split)).tolist()
    return Score(loss, 100.0 * correct)


def flatness_sample(split: Split, samples: int, seed: int) -> Split:
    """Draw `samples` images, or all where there are fewer, by `seed`: the same at every measurement of a run."""
    drawn = torch.randperm(len(split), generator=generator(seed, FLATNESS_SAMPLE))[:samples]
    drawn = drawn.sort().values.to(split.labels.device)
    return Split(split.images[drawn], split.labels[drawn])


def measure_flatness(
    network: nn.Module, sample: Split, rho: float, raise_if_stopped: Callable[[], None]
) -> dict[str, float]:
    """Measure S(w) at `rho`, the Hessian's largest eigenvalue and the norm of the gradient: fields of `Record`.

    In evaluation mode and in the weights' own precision; the network and all generators are unchanged. All values are
    NaN if the loss is not finite. `raise_if_stopped` is called after every pass over the sample.
    """
    data = normalize(sample.images), sample.labels
    objective = flatness.Objective(network, data, loss=F.cross_entropy, progress=lambda *_: raise_if_stopped())
    try:
        found = flatness.sharpness(objective, rho=rho, seed=0)
    except FloatingPointError:  # the run itself continues, and checks its loss
        return dict.fromkeys(("sharpness", "lambda_max", "gradient_norm"), math.nan)
    top = flatness.eigenvalues(flatness.Hessian(objective), k=1, tol=_TOLERANCE, seed=0)
    return {"sharpness": found.value, "lambda_max": float(top.values[0]), "gradient_norm": found.gradient_norm}
