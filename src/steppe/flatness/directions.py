"""Directions in weight space: random ones at the scale of the network's filters, and from one model to another."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from steppe._checks import check_count
from steppe._tensors import random as random_tensors
from steppe.flatness._checkpoint import Other, read_checkpoint
from steppe.flatness.objective import Objective

Normalize: TypeAlias = Literal["filter", "layer", "weights"] | None


def random_directions(
    objective: Objective, count: int = 2, *, seed: int = 0, normalize: Normalize = "filter"
) -> Tensor:
    """Draw Gaussian directions d with the norms of the weights, filter by filter: d_f <- d_f |w_f| / |d_f|.

    A landscape along them is invariant to rescalings that preserve the network's function: of one layer against the
    next with a ReLU between them, or of any filter before a BatchNorm. Parameters of fewer than two dimensions (biases,
    normalization layers) are not perturbed, as in the paper.

    A filter is the weights that compute one output: w[i] for a weight of two or more dimensions (a row of a linear
    layer, a kernel of a convolution, the vector of one token in an embedding), and w[:, i], within its group, for a
    transposed convolution. The direction of a filter of zeros is zero.

    The draws depend only on the seed, the index of the direction, and position and shape of the parameter, on every
    device. Two models of the same shapes get the same draws, each at its own scale.

    Args:
        objective: The loss whose weights set the scale.
        count: Number of directions.
        seed: Seed of the draws.
        normalize: "filter"; "layer", by whole tensors; "weights", d_i |w_i|; or None, without scaling. The last two
            perturb all parameters.

    Returns:
        The directions in rows, (count, n), of the objective's dtype.

    Raises:
        ValueError: ``count`` is below 1, or all directions would be zero because no parameter has two dimensions.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        >>> objective = Objective(model, (torch.ones(1, 2), torch.ones(1, 2)), loss=torch.nn.functional.mse_loss)
        >>> weight, bias = objective.unflatten(random_directions(objective, 1)[0])
        >>> weight.norm(dim=1), bias
        (tensor([5., 1.]), tensor([0., 0.]))

    References:
        Li et al. 2018, Visualizing the Loss Landscape of Neural Nets, https://arxiv.org/abs/1712.09913.
    """
    check_count("count", count, "the number of directions")
    if normalize not in ("filter", "layer", "weights", None):
        raise ValueError(f"normalize={normalize!r}: choose 'filter', 'layer', 'weights' or None")
    weights = objective.unflatten(objective.weights)
    if normalize in ("filter", "layer") and all(w.dim() < 2 for w in weights):
        raise ValueError(
            f"normalize={normalize!r} perturbs parameters of two or more dimensions, but there are none among "
            f"{', '.join(objective.names[:3])}: choose 'weights' or None"
        )
    groups = _transposed_convolutions(objective.model)
    shapes = [_filter_shape(w, normalize, groups.get(name)) for name, w in zip(objective.names, weights, strict=True)]
    like = [torch.empty(w.shape) for w in weights]
    directions = []
    for index in range(count):
        draws = random_tensors.normal("random_directions", seed, index, like)
        scaled = (_scaled(d, w, normalize, s) for d, w, s in zip(draws, weights, shapes, strict=True))
        directions.append(objective.flatten([d.to(objective.dtype) for d in scaled]))
    return torch.stack(directions)


def between(objective: Objective, other: Other) -> Tensor:
    """Return the direction from w to the weights w' of another model, d = w' - w, (n,).

    Args:
        objective: The loss at w.
        other: A model of the same shapes, its state dict, or a vector (n,).

    Returns:
        The direction, (n,), of the objective's dtype.

    Raises:
        TypeError: ``other`` is sharded, or not a model, a state dict or a vector.
        ValueError: Other names or shapes, or a difference in parameters that are not among the weights.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> objective = Objective(model, (torch.ones(1, 1), torch.ones(1, 1)), loss=torch.nn.functional.mse_loss)
        >>> between(objective, {"weight": torch.tensor([[3.0]])})
        tensor([1.])
    """
    return read_checkpoint(objective, other).weights - objective.weights


def _filter_shape(w: Tensor, normalize: Normalize, groups: int | None) -> tuple[int, ...]:
    """Return a view of four dimensions whose first and third enumerate the filters."""
    if normalize == "filter" and w.dim() > 1:
        return (groups, w.shape[0] // groups, w.shape[1], -1) if groups else (len(w), 1, 1, w[0].numel())
    return (1, 1, 1, w.numel())


def _scaled(d: Tensor, w: Tensor, normalize: Normalize, shape: tuple[int, ...]) -> Tensor:
    """Scale the draw d of one parameter w; in float64, because float32 norms of long filters are inaccurate."""
    if normalize is None:
        return d
    d, w = d.double(), w.to("cpu", torch.float64)
    if normalize == "weights":
        return d * w.abs()
    if w.dim() < 2:
        return torch.zeros_like(d)
    d, w = d.view(shape), w.reshape(shape)
    scaled: Tensor = d / d.norm(dim=(1, 3), keepdim=True) * w.norm(dim=(1, 3), keepdim=True)
    return scaled.flatten()


def _transposed_convolutions(model: nn.Module) -> dict[str, int]:
    """Return the number of groups by weight name; the filters of these weights lie along the second dimension."""
    modules = model.named_modules()
    return {f"{k}.weight".lstrip("."): m.groups for k, m in modules if isinstance(m, nn.modules.conv._ConvTransposeNd)}
