"""A radius for each layer that remains right when the network becomes wider (muP^2).

SAM divides all layers by one gradient norm, which in a wide network is that of the output layer: the other layers are
hardly perturbed, and the best rho changes with the width. :func:`parameter_groups` gives each layer a radius such that
its perturbation changes the network's function as much at every width.
"""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from steppe._engine.groups import RHO
from steppe.papers import NEURIPS, Paper, cites

MUP2_PAPER = Paper(
    "haas2024mup2",
    ("Moritz Haas", "Jin Xu", "Volkan Cevher", "Leena Chennuru Vankadara"),
    "$\\boldsymbol{\\mu}\\mathbf{P^2}$: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling",
    "2411.00075",
    2024,
    NEURIPS,
)

_TRANSPOSED = (nn.Embedding, nn.EmbeddingBag, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Modules whose weight has the shape (inputs, outputs, ...)."""


@cites(MUP2_PAPER)
def parameter_groups(
    model: nn.Module, base_model: nn.Module, rho: float = 0.05, *, lr: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups whose radii have the same effect as rho in a narrower model of the same architecture.

    For a layer whose inputs and outputs are r_in and r_out times those of ``base_model``, and an output layer whose
    input is n times as wide,

        sam_rho = rho sqrt(n) r_out / r_in,     lr = lr r_out / r_in.

    So rho becomes n^(3/2) rho for the first layer, biases and normalization layers, n^(1/2) rho for hidden layers,
    n^(-1/2) rho for the output layer. Give the groups to the base optimizer; SAM's perturbation in each is
    sam_rho g / |g|, with |g| over all groups.

    The model must be in muP: give its output layer weights with a standard deviation that falls as 1/n (or zeros), the
    other layers the usual one that falls as 1 / sqrt(fan-in); no layer has a multiplier that depends on the width. (The
    ``MuReadout`` of the mup package has one: with it, these radii do not apply.) With ``lr``, each group has muP's
    learning rate for SGD. For Adam, set the learning rates yourself; the radii are the same.

    The radii follow from the condition of the paper that a perturbation be as large as muP's update, |e_l| =
    sqrt(fan-out / fan-in) rho in the spectral norm, and the size of the gradients in muP. The paper's own table could
    not be read; a test measures that the effect of each layer's perturbation does not change with the width.

    Args:
        model: The model to train.
        base_model: The same architecture, with the width at which rho and lr were chosen; only its shapes are read, so
            it may be on the meta device.
        rho: rho, the best radius of ``base_model`` with these groups (where all are rho).
        lr: The learning rate of ``base_model``; None leaves it out of the groups.

    Returns:
        A group for each radius, with all parameters of the model, in their order.

    Raises:
        ValueError: The models have other parameters, no layer maps the width to outputs of a fixed number, or a shared
            parameter has two roles.

    Example:
        >>> net = lambda n: nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 2))
        >>> groups = parameter_groups(net(64), net(16), rho=0.1, lr=0.01)
        >>> [(len(group["params"]), round(group["sam_rho"], 3), group["lr"]) for group in groups]
        [(3, 0.8, 0.04), (2, 0.2, 0.01), (1, 0.05, 0.0025)]

    References:
        Haas et al., Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling, arXiv 2411.00075;
        Yang et al., Tensor Programs V, arXiv 2203.03466 (muP).
    """
    ratios = _ratios(model, base_model)
    of_outputs = [r_in for r_out, r_in in ratios.values() if r_out == 1 and r_in != 1]
    if not of_outputs and any(ratio != (1, 1) for ratio in ratios.values()):
        raise ValueError(
            "no layer of model= has an input that is wider than that of base_model= and an output that is not, so the "
            "factor of the width is unknown: give a model with its output layer"
        )
    n = max(of_outputs, default=1.0)
    groups: dict[float, dict[str, Any]] = {}
    for parameter, (r_out, r_in) in ratios.items():
        factor = r_out / r_in
        group = {"params": [], RHO: rho * math.sqrt(n) * factor, **({} if lr is None else {"lr": lr * factor})}
        groups.setdefault(factor, group)["params"].append(parameter)
    return list(groups.values())


def _ratios(model: nn.Module, base_model: nn.Module) -> dict[Tensor, tuple[float, float]]:
    """Return how many times as many outputs and inputs each parameter has as in the base model."""
    ours, theirs = (dict(_parameters(m)) for m in (model, base_model))
    if other := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(
            f"model= and base_model= have other parameters, such as {other[0]}: give two models of the same "
            "architecture that differ in their width only"
        )
    ratios: dict[Tensor, tuple[float, float]] = {}
    for name, (parameter, kind) in ours.items():
        shape, base_shape = parameter.shape, theirs[name][0].shape
        if len(shape) != len(base_shape) or 0 in base_shape:
            raise ValueError(
                f"{name} has the shape {tuple(shape)} in model=, and {tuple(base_shape)} in base_model=: give two "
                "models of the same architecture that differ in their width only"
            )
        ratio = _ratio([a / b for a, b in zip(shape, base_shape, strict=True)], kind)
        if ratios.setdefault(parameter, ratio) != ratio:
            raise ValueError(
                f"{name} is shared by layers in which its width has different roles (tied weights), which need "
                "different radii: untie them, or set sam_rho by hand"
            )
    return ratios


def _parameters(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, nn.Module]]]:
    """Yield the name of each parameter, shared ones under each name, with its module."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(prefix, recurse=False):
            yield name, (parameter, module)


def _ratio(sides: list[float], module: nn.Module) -> tuple[float, float]:
    """Return the factors of outputs and inputs from those of the sides of a parameter."""
    is_weight = len(sides) > 1 and isinstance(
        module, nn.Linear | nn.modules.conv._ConvNd | nn.Embedding | nn.EmbeddingBag
    )
    if is_weight:
        return (sides[1], sides[0]) if isinstance(module, _TRANSPOSED) else (sides[0], sides[1])
    wider = [side for side in sides if side != 1]
    if len(wider) < 2:  # a vector: a bias, a norm layer's weight, positions
        return (wider[0] if wider else 1.0), 1.0
    return wider[0], wider[1]  # a matrix of a module's own, such as the projections of nn.MultiheadAttention
