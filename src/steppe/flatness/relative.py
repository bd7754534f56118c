"""Relative flatness: the curvature of one layer, times the size of its weights."""

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from steppe._tensors import ops as tensors
from steppe._tensors import random as random_tensors
from steppe.flatness.operators import Hessian
from steppe.flatness.values import Estimate

_AT_ONCE = 16  # vectors multiplied in one pass, each as long as all weights


def relative_flatness(
    hessian: Hessian, weight: str, *, probes: int = 16, seed: int = 0, exact: bool = False
) -> Estimate:
    """Estimate the relative flatness of a linear layer: kappa = sum over s, s' of <w_s, w_s'> Tr(H_s,s').

    w_s are the rows of its weight W, one a neuron, and H_s,s' the blocks of the loss's Hessian that belong to two of
    them. The smaller, the flatter. Each probe is one product with the Hessian: for random signs a and z,
    E u'Hu = kappa with u = (W a) z'.

    In a ReLU network, kappa of both layers stays as it is where a layer is multiplied, with its bias, by a factor, and
    the next one divided by it. Where every neuron has a factor of its own, it is that of the layer they are in which
    stays, and not that of the next one.

    Args:
        hessian: of a loss; with ``objective.within([weight])``, as a function of this one parameter, the vectors are
            short.
        weight: the name of the layer's matrix, (out, in), one of ``hessian.objective.names``.
        probes: how many; their standard error comes with the estimate.
        seed: of the signs.
        exact: sum over all, without randomness: in * min(out, in) products.

    Raises:
        ValueError: the name is none of the weights, or none of a matrix; there are no probes.

    >>> from steppe.flatness import Objective
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> hessian = Hessian(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
    >>> round(relative_flatness(hessian, "weight", exact=True).value, 4)  # |w|^2 = 2, Tr H = 1 + 4
    10.0

    Source: Petzka et al., Relative Flatness and Generalization, arXiv 2001.00939.
    """
    objective = hessian.objective
    if weight not in objective.names:
        raise ValueError(f"{weight} is none of the weights that are measured: {', '.join(objective.names)}")
    position = objective.names.index(weight)
    W = objective.unflatten(objective.weights)[position]
    if W.dim() != 2:
        raise ValueError(
            f"{weight} has shape {tuple(W.shape)}, and relative flatness is of a linear layer, whose weight is a "
            "matrix (out, in)"
        )
    if probes < 1:
        raise ValueError(f"probes={probes}: an estimate needs at least one")
    objective.stage = f"relative flatness of {weight}"

    vectors, forms = _all(W) if exact else _probes(W, probes, seed), []
    while us := list(islice(vectors, _AT_ONCE)):
        rows = torch.zeros(len(us), objective.n, dtype=objective.dtype, device=objective.device)
        for row, u in zip(rows, us, strict=True):
            objective.unflatten(row)[position].copy_(u)
        forms += [float(tensors.dot([u], [Hu])) for u, Hu in zip(rows, hessian(rows), strict=True)]
    return Estimate(sum(forms), 0.0, len(forms)) if exact else Estimate.of(forms)


def _probes(W: Tensor, probes: int, seed: int) -> Iterator[Tensor]:
    """(W a) z' for random signs a and z."""
    for probe in range(probes):
        bits = random_tensors.integers("steppe.relative_flatness", seed, probe, [W[0], W[0]], below=2)
        a, z = (bit.to(W.dtype) * 2 - 1 for bit in bits)
        yield torch.outer(W @ a, z)


def _all(W: Tensor) -> Iterator[Tensor]:
    """(sigma_r u_r) e_j' for every singular vector u_r of W, since W W' = sum_r sigma_r^2 u_r u_r', and column j."""
    U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
    for column in range(W.shape[1]):
        for left in (U * sigma).T:
            u = torch.zeros_like(W)
            u[:, column] = left
            yield u
