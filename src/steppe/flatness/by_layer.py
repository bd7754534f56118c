"""Curvature layer by layer: the diagonal blocks of the Hessian."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from steppe.flatness.eigenvalues import eigenvalues
from steppe.flatness.estimate import Estimate
from steppe.flatness.families import Measure
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Hessian, Operator
from steppe.flatness.relative_flatness import relative_flatness
from steppe.flatness.trace import trace


@dataclass(frozen=True)
class LayerCurvature:
    """The curvature of the loss as a function of the parameters of one layer, the others being constants."""

    layer: str
    """Name of the layer."""
    parameters: tuple[str, ...]
    """Names of its parameters."""
    n: int
    """Number of its weights."""
    lambda_max: Measure
    """The largest eigenvalue of its block, with |B u - lambda u| as the error."""
    trace: Estimate
    """The trace of its block."""
    relative_flatness: Estimate | None
    """Of its linear layer; None if it has none, or several, or one whose matrix is computed from other parameters
    (``weight_norm``, ``orthogonal``), so that no Hessian in its entries is known."""


@dataclass(frozen=True)
class LayerTable:
    """The curvature of each layer, in the order of the model. ``print`` shows a table."""

    layers: tuple[LayerCurvature, ...]

    def __iter__(self) -> Iterator[LayerCurvature]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: str) -> LayerCurvature:
        """Return the row of a layer."""
        return {row.layer: row for row in self.layers}[layer]

    def __str__(self) -> str:
        rows = [("layer", "weights", "lambda_max", "trace", "relative flatness")]
        for row in self.layers:
            top = f"{row.lambda_max.value:.3g}" + (f" ({row.lambda_max.note})" if row.lambda_max.note else "")
            flat = "-" if row.relative_flatness is None else _with_error(row.relative_flatness)
            rows.append((row.layer, f"{row.n:,}", top, _with_error(row.trace), flat))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        aligned = (
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            for row in rows
        )
        return "\n".join("  ".join(cells) for cells in aligned)


def by_layer(
    objective: Objective,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    matrix: Callable[[Objective], Operator] = Hessian,
    probes: int = 16,
    tol: float = 1e-3,
    max_matvecs: int = 500,
    seed: int = 0,
) -> LayerTable:
    """Measure largest eigenvalue, trace and relative flatness of each layer: of the diagonal blocks of the Hessian.

    The traces of all layers add up to the trace of the Hessian. The largest of their eigenvalues is at most that of the
    Hessian, and the difference is due to the blocks between layers, which the table leaves out.

    Args:
        objective: The loss over the data.
        groups: Names of parameters by the name of their group, such as the blocks of a transformer; by default one
            group for each module that has parameters of its own.
        matrix: :class:`~steppe.flatness.Hessian`, or another function of an objective that returns an operator, such as
            :class:`~steppe.flatness.GaussNewton`. Relative flatness is always that of the Hessian.
        probes: Random vectors for the trace, and for relative flatness; one product each.
        tol: Relative tolerance of the largest eigenvalue, as in :func:`~steppe.flatness.eigenvalues`.
        max_matvecs: Maximum number of products for an eigenvalue.
        seed: Seed of all random draws.

    Returns:
        A :class:`LayerTable`.

    Raises:
        ValueError: An empty group, or a name that is not among the weights of the objective.
        RuntimeError: The model contains an operation without a second derivative.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = torch.nn.init.ones_(p)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> table = by_layer(Objective(model, (x, y), loss=torch.nn.functional.mse_loss))
        >>> for row in table:
        ...     print(row.layer, round(row.lambda_max.value, 3), round(row.trace.value, 3))
        0 4.0 5.0
        1 5.0 5.0

    References:
        Petzka et al. 2021, Relative Flatness and Generalization, https://arxiv.org/abs/2001.00939.
    """
    groups = _modules(objective) if groups is None else groups
    for group, names in groups.items():
        if not names:
            raise ValueError(f"groups: {group} has no parameters, but a block needs at least one row")
        if unknown := set(names) - set(objective.names):
            raise ValueError(
                f"groups: {', '.join(sorted(unknown))} of {group} is not among the weights of the objective: take "
                "names of objective.names"
            )
    linear = {f"{k}.weight".lstrip(".") for k, m in objective.model.named_modules() if isinstance(m, nn.Linear)}
    rows = []
    for group, names in groups.items():
        layer = objective.restrict_to(names)
        layer.stage = f"curvature of {group}"
        operator = matrix(layer)
        top = eigenvalues(operator, 1, tol=tol, max_matvecs=max_matvecs, seed=seed)
        total = trace(operator, probes=probes, top=top, seed=seed)
        weights = linear.intersection(names)
        relative = None
        if len(weights) == 1:
            weight = weights.pop()
            relative = relative_flatness(Hessian(objective.restrict_to([weight])), weight, probes=probes, seed=seed)
        largest = Measure.of_eigenvalue(top)
        rows.append(LayerCurvature(group, tuple(layer.names), layer.n, largest, total, relative))
    return LayerTable(tuple(rows))


def _modules(objective: Objective) -> dict[str, list[str]]:
    """Return the parameters of each module that has some of its own, by its name."""
    groups: dict[str, list[str]] = {}
    for name in objective.names:
        groups.setdefault(_module(name) or type(objective.model).__name__, []).append(name)
    return groups


def _module(parameter: str) -> str:
    """Return the name of the module that a parameter belongs to, also as the original of a parametrization.

    >>> _module("0.bias"), _module("0.parametrizations.weight.original0"), _module("weight")
    ('0', '0', '')
    """
    module, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    return (module if parametrized else module.rpartition(".")[0]).removeprefix(".")


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} ± {estimate.error:.1g}"
