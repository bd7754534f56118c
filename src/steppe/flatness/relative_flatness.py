"""Relative flatness: the curvature of one linear layer, multiplied by the size of its weights."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe._tensors import random as random_tensors
from steppe._tensors import reductions
from steppe.flatness._orthogonal import matmul
from steppe.flatness.estimate import Estimate
from steppe.flatness.operators import Hessian

_VECTORS_PER_PASS = 16  # each as long as all weights


def relative_flatness(
    hessian: Hessian, weight: str, *, probes: int = 16, seed: int = 0, exact: bool = False
) -> Estimate:
    """Estimate the relative flatness of a linear layer, kappa = sum over s, s' of <w_s, w_s'> Tr(H_s,s').

    w_s are the rows of the weight matrix W, one per neuron, and H_s,s' the blocks of the Hessian that belong to two of
    them. Smaller is flatter. Each probe is one product with the Hessian: for random signs a and z, E u'Hu = kappa with
    u = (W a) z'.

    In a ReLU network kappa of both layers is unchanged when one layer, with its bias, is multiplied by a factor and the
    next one divided by it. If each neuron has its own factor, kappa of the neurons' own layer is unchanged, and kappa
    of the next layer is not.

    Args:
        hessian: Hessian of a loss. With ``objective.restrict_to([weight])``, a function of this parameter only, the
            vectors are short.
        weight: Name of the layer's matrix, (out, in), one of ``hessian.objective.names``.
        probes: Number of random vectors, one product each.
        seed: Seed of the signs.
        exact: Compute the whole sum without randomness, in in * min(out, in) products.

    Returns:
        The mean over the probes with its standard error, which is 0 if exact.

    Raises:
        ValueError: An unknown name, a weight that is not a matrix, or ``probes`` below 1.

    Example:
        >>> from steppe.flatness import Objective
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> hessian = Hessian(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> round(relative_flatness(hessian, "weight", exact=True).value, 4)  # |w|^2 = 2, Tr H = 1 + 4
        10.0

    References:
        Petzka et al. 2021, Relative Flatness and Generalization, https://arxiv.org/abs/2001.00939.
    """
    objective = hessian.objective
    if weight not in objective.names:
        raise ValueError(f"{weight} is not among the parameters of the objective: {', '.join(objective.names)}")
    position = objective.names.index(weight)
    W = objective.unflatten(objective.weights)[position]
    if W.dim() != 2:
        raise ValueError(
            f"{weight} has shape {tuple(W.shape)}, but relative flatness is defined for a linear layer, whose weight "
            "is a matrix (out, in)"
        )
    check_count("probes", probes, "the number of random vectors")
    objective.stage = f"relative flatness of {weight}"

    vectors, values = _all_vectors(W) if exact else _random_vectors(W, probes, seed), []
    while us := list(islice(vectors, _VECTORS_PER_PASS)):
        rows = torch.zeros(len(us), objective.n, dtype=objective.dtype, device=objective.device)
        for row, u in zip(rows, us, strict=True):
            objective.unflatten(row)[position].copy_(u)
        values += [float(reductions.dot([u], [Hu])) for u, Hu in zip(rows, hessian(rows), strict=True)]
    return Estimate(sum(values), 0.0, len(values)) if exact else Estimate.of(values)


def _random_vectors(W: Tensor, probes: int, seed: int) -> Iterator[Tensor]:
    """Yield (W a) z' for random signs a and z."""
    for probe in range(probes):
        bits = random_tensors.integers("steppe.relative_flatness", seed, probe, [W[0], W[0]], below=2)
        a, z = (bit.to(W.dtype) * 2 - 1 for bit in bits)
        yield torch.outer(matmul(W, a), z)


def _all_vectors(W: Tensor) -> Iterator[Tensor]:
    """Yield (sigma_r u_r) e_j' for all singular vectors u_r of W, as W W' = sum_r sigma_r^2 u_r u_r', and columns j."""
    U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
    for column in range(W.shape[1]):
        for left in (U * sigma).T:
            u = torch.zeros_like(W)
            u[:, column] = left
            yield u
