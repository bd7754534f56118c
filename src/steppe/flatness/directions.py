"""Where to look from w: random directions at the scale of the network's filters, and the way to another solution."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from steppe._tensors import random as random_tensors
from steppe.flatness.objective import Objective

Normalize: TypeAlias = Literal["filter", "layer", "weights"] | None
"""To what scale each part of a random direction is brought."""
Other: TypeAlias = nn.Module | Mapping[str, Tensor] | Tensor
"""Another solution: a model, its state dict, or its weights as a vector (n,)."""


def random_directions(
    objective: Objective, count: int = 2, *, seed: int = 0, normalize: Normalize = "filter"
) -> Tensor:
    """Draw Gaussian directions d as long, filter by filter, as the weights: d_f <- d_f |w_f| / |d_f|.

    So the landscape does not change when the network is rescaled and its function is not: one layer against the next
    with a ReLU between them, or any filter before a BatchNorm. Parameters of fewer than two dimensions (biases,
    normalization layers) stay where they are, as in the paper.

    A filter is what computes one output: w[i] for a weight of two dimensions and more (a row of a linear layer, a
    kernel of a convolution, the vector of one token in an embedding), and w[:, i], within its group, of a transposed
    convolution. A filter of zeros stays one.

    The draws depend on the seed, the direction's number and the parameter's position and shape alone, on every device:
    two models of the same shapes get the same ones, each at its own scale.

    Args:
        objective: the loss that is to be looked at.
        count: how many directions.
        seed: another one gives other directions.
        normalize: "filter"; "layer", with whole tensors in the place of filters; "weights", d_i |w_i|, or None, as they
            are drawn: both of these move all parameters.

    Returns:
        A tensor (count, n), of the objective's dtype.

    Raises:
        ValueError: a count below 1; all directions would be zero, as no parameter has two dimensions.

    >>> model = torch.nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> objective = Objective(model, (torch.ones(1, 2), torch.ones(1, 2)), loss=torch.nn.functional.mse_loss)
    >>> weight, bias = objective.unflatten(random_directions(objective, 1)[0])
    >>> weight.norm(dim=1), bias
    (tensor([5., 1.]), tensor([0., 0.]))

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, arXiv 1712.09913.
    """
    if count < 1:
        raise ValueError(f"count={count}: a landscape needs at least one direction")
    if normalize not in ("filter", "layer", "weights", None):
        raise ValueError(f"normalize={normalize!r}: choose 'filter', 'layer', 'weights' or None")
    weights = objective.unflatten(objective.weights)
    if normalize in ("filter", "layer") and all(w.dim() < 2 for w in weights):
        raise ValueError(
            f"normalize={normalize!r} moves parameters of two dimensions and more, and there are none among "
            f"{', '.join(objective.names[:3])}: choose 'weights' or None"
        )
    groups = _transposed(objective.model)
    shapes = [_filters(w, normalize, groups.get(name)) for name, w in zip(objective.names, weights, strict=True)]
    like = [torch.empty(w.shape) for w in weights]
    drawn = []
    for number in range(count):
        parts = random_tensors.normal("random_directions", seed, number, like)
        scaled = (_scaled(d, w, normalize, s) for d, w, s in zip(parts, weights, shapes, strict=True))
        drawn.append(objective.flatten([d.to(objective.dtype) for d in scaled]))
    return torch.stack(drawn)


def between(objective: Objective, other: Other) -> Tensor:
    """Return the direction from w to another solution w', d = w' - w, (n,).

    Args:
        objective: the loss at w.
        other: a model of the same shapes, its state dict, or a vector (n,).

    Raises:
        TypeError: it is none of these.
        ValueError: other names or shapes, or other parameters that are not among the weights here.

    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)
    >>> objective = Objective(model, (torch.ones(1, 1), torch.ones(1, 1)), loss=torch.nn.functional.mse_loss)
    >>> between(objective, {"weight": torch.tensor([[3.0]])})
    tensor([1.])
    """
    return solution(objective, other).weights - objective.weights


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights, as a vector (n,), and the buffers that belong to them, as far as they are known."""

    weights: Tensor
    buffers: dict[str, Tensor]


def here(objective: Objective) -> Solution:
    """Return the model as it is."""
    return Solution(objective.weights, {k: b.clone() for k, b in objective.model.named_buffers()})


def solution(objective: Objective, other: Other) -> Solution:
    """Read another solution, and make sure that it is one of the same model."""
    if isinstance(other, Tensor):
        return Solution(objective.flatten(objective.unflatten(other.detach())), {})
    theirs, ours = _state(other), _everything(objective.model)
    needed = {k for k, _ in objective.model.named_parameters()} | (
        {k for k, _ in objective.model.named_buffers()} & set(objective.model.state_dict())
    )
    _same_names(needed, set(ours), set(theirs))
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            raise ValueError(
                f"other: {name} is of shape {tuple(tensor.shape)}, and here of {tuple(ours[name].shape)}: between two "
                "networks there is a line only where their shapes are the same"
            )
    for name, p in objective.model.named_parameters():
        if name not in objective.names and not torch.equal(p, theirs[name].to(p)):
            raise ValueError(
                f"other: {name} differs, and is not among the weights of this objective, so that the way from one to "
                "the other would not arrive: add it to parameters=, or load the same into both"
            )
    weights = objective.flatten([theirs[k].detach() for k in objective.names])
    return Solution(weights, {k: theirs[k].to(b) for k, b in objective.model.named_buffers() if k in theirs})


def _filters(w: Tensor, normalize: Normalize, groups: int | None) -> tuple[int, ...]:
    """The shape in which the first and third of four dimensions number the filters."""
    if normalize == "filter" and w.dim() > 1:
        return (groups, w.shape[0] // groups, w.shape[1], -1) if groups else (len(w), 1, 1, w[0].numel())
    return (1, 1, 1, w.numel())


def _scaled(d: Tensor, w: Tensor, normalize: Normalize, shape: tuple[int, ...]) -> Tensor:
    """A drawn tensor at the scale of the weights; in float64, where norms of long filters are right."""
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


def _transposed(model: nn.Module) -> dict[str, int]:
    """The weights of transposed convolutions, whose filters lie along the second dimension, with their groups."""
    modules = model.named_modules()
    return {f"{k}.weight".lstrip("."): m.groups for k, m in modules if isinstance(m, nn.modules.conv._ConvTransposeNd)}


def _everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names: one that is tied has several in a state dict."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return parameters | dict(model.named_buffers(remove_duplicate=False))


def _state(other: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    if isinstance(other, DistributedDataParallel):
        other = other.module
    if isinstance(other, nn.Module):
        return _everything(other)
    if isinstance(other, Mapping):
        return {k: v for k, v in other.items() if isinstance(v, Tensor) and not k.endswith("_extra_state")}
    raise TypeError(f"other is {type(other).__name__}: give a model, its state dict, or its weights as a vector (n,)")


def _same_names(needed: set[str], known: set[str], given: set[str]) -> None:
    lacking, unknown = sorted(needed - given), sorted(given - known)
    if lacking or unknown:
        said = [
            f"{', '.join(names[:3])} {what}" for names, what in ((lacking, "missing"), (unknown, "too much")) if names
        ]
        raise ValueError(
            f"other: {'; '.join(said)}. Between two networks there is a line only where they are of the same make (and "
            "neither inside DistributedDataParallel or torch.compile, which give the names a prefix)"
        )
