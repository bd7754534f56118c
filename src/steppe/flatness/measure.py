"""Evaluate all measures of flatness of one model."""

import math
import time
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from steppe._tensors.reductions import norm
from steppe.flatness._further import check_measures, further_measures
from steppe.flatness.average_sharpness import average_sharpness
from steppe.flatness.budget import Budget
from steppe.flatness.directions import random_directions
from steppe.flatness.eigenvalues import Eigenpairs, eigenvalues
from steppe.flatness.families import Measure
from steppe.flatness.landscape import Landscape, landscape
from steppe.flatness.m_sharpness import m_sharpness
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Hessian, Operator, Scaled
from steppe.flatness.relative_flatness import relative_flatness
from steppe.flatness.result import Flatness
from steppe.flatness.sharpness import sharpness
from steppe.flatness.spectral_density import density
from steppe.flatness.trace import trace


def measure(
    objective: Objective,
    budget: Budget | None = None,
    *,
    normalized: Objective | None = None,
    optimizer: Optimizer | None = None,
) -> Flatness:
    """Evaluate the measures of ``FAMILIES`` at the current weights w; the further ones if the budget names them.

    A measure that the model does not allow raises its error before the first one is evaluated.

    No single number decides whether a minimum is flat. The raw measures, such as S(w), lambda_max and Tr H, change when
    a network is rescaled without changing its function; the adaptive measures do not. Compare two models on the same
    samples, by both families.

    Args:
        objective: The loss over the data at the current weights.
        budget: Radii, numbers of steps and probes; by default ``Budget()``.
        normalized: The same objective with the loss :func:`normalized_logits`, for the measures on normalized logits;
            without it they are left out.
        optimizer: The Adam or AdamW that has trained the model, or a SAM around it, for ``adam_sharpness``.

    Returns:
        A :class:`Flatness`. Relative flatness is included if the matrix of the last linear layer is among the weights,
        and not if it is computed from them (``weight_norm``, ``orthogonal``).

    Raises:
        FloatingPointError: The loss is not finite at w, or NaN at a perturbed point.
        ValueError: A budget out of range, a product with the Hessian that is not finite, or a further measure that this
            loss or optimizer does not allow.
        TypeError: Gauss-Newton or Fisher matrices of an objective whose outputs are not known.
        RuntimeError: The model contains an operation without a second derivative.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> data = torch.randn(32, 2), torch.randint(2, (32,))
        >>> found = measure(Objective(model, data, loss=nn.functional.cross_entropy), Budget(m=16, points=0))
        >>> found.measures["sharpness"].value > found.measures["average_sharpness"].value > 0
        True
    """
    budget = budget or Budget()
    begun = time.perf_counter()
    check_measures(objective, budget, optimizer)
    loss, measures = _sharpness_measures(objective, budget)
    if normalized is not None:
        measures |= _normalized_measures(normalized, budget)
    hessian = Hessian(objective)
    top, hessian_measures = _hessian_measures(objective, hessian, budget)
    measures |= hessian_measures
    objective.stage = "spectral density"
    options = {"probes": budget.density_probes, "num_iterations": budget.density_iterations, "seed": budget.seed}
    spectrum = density(hessian, **options)
    hessian.free_graph()
    measures |= further_measures(objective, budget, optimizer)
    random, eigen = _landscapes(objective, top, budget)
    measures |= {"loss": Measure(loss), "weight_norm": Measure(float(norm([objective.weights])))}
    settings = {
        "samples": objective.samples,
        "batch_norm": objective.batch_norm,
        "parameters": objective.n,
        "dtype": str(objective.dtype).removeprefix("torch."),
        **asdict(budget),
    }
    if objective.weighted_by != "samples":
        settings["weighted_by"] = objective.weighted_by
    seconds = time.perf_counter() - begun
    return Flatness(settings, measures, top.values, top.residuals, spectrum, random, eigen, seconds)


def _sharpness_measures(objective: Objective, budget: Budget) -> tuple[float, dict[str, Measure]]:
    """Return the loss, and the measures that need no second derivative."""
    ascent = _ascent_options(budget)
    draws: dict[str, Any] = {"pairs": budget.pairs, "seed": budget.seed}
    objective.stage = "sharpness"
    worst = sharpness(objective, budget.rho, **ascent)
    adaptive = sharpness(objective, budget.adaptive_rho, adaptive=True, **ascent)
    parts = m_sharpness(objective, budget.rho, budget.m, **ascent)
    objective.stage = "average-case sharpness"
    average = average_sharpness(objective, budget.sigma, **draws)
    adaptive_average = average_sharpness(objective, budget.adaptive_sigma, adaptive=True, **draws)
    return worst.loss, {
        "sharpness": Measure(worst.value, note=_ascent_note(worst.restarts)),
        "first_order": Measure(worst.first_order),
        "m_sharpness": Measure.of_parts(parts, budget.m),
        "average_sharpness": Measure.of_estimate(average),
        "gradient_norm": Measure(worst.gradient_norm),
        "adaptive_sharpness": Measure(adaptive.value, note=_ascent_note(adaptive.restarts)),
        "adaptive_average_sharpness": Measure.of_estimate(adaptive_average),
    }


def _normalized_measures(objective: Objective, budget: Budget) -> dict[str, Measure]:
    ascent = _ascent_options(budget)
    objective.stage = "sharpness, normalized logits"
    worst = sharpness(objective, budget.rho, **ascent)
    adaptive = sharpness(objective, budget.adaptive_rho, adaptive=True, **ascent)
    return {
        "normalized_sharpness": Measure(worst.value, note=_ascent_note(worst.restarts)),
        "normalized_adaptive_sharpness": Measure(adaptive.value, note=_ascent_note(adaptive.restarts)),
    }


def _hessian_measures(objective: Objective, hessian: Hessian, budget: Budget) -> tuple[Eigenpairs, dict[str, Measure]]:
    """Return the largest eigenvalues, and all measures that are computed from products with the Hessian."""
    measures = {}
    scaled = Scaled(hessian, objective.weights.abs())
    k = min(budget.num_eigenvalues, objective.n)

    def extreme(stage: str, operator: Operator, **options: Any) -> Eigenpairs:
        objective.stage = stage
        return eigenvalues(operator, **options, tol=budget.tol, seed=budget.seed)

    top = extreme("largest eigenvalues", hessian, k=k)
    bottom = extreme("smallest eigenvalue", hessian, which="smallest")
    adaptive_top = extreme("largest eigenvalues, adaptive", scaled, k=k)
    for name, pairs in (("lambda_max", top), ("lambda_min", bottom), ("adaptive_lambda_max", adaptive_top)):
        measures[name] = Measure.of_eigenvalue(pairs)
    objective.stage = "traces"
    for name, operator, known in (("trace", hessian, top), ("adaptive_trace", scaled, adaptive_top)):
        measures[name] = Measure.of_estimate(trace(operator, probes=budget.probes, top=known, seed=budget.seed))
    linear = [f"{k}.weight" if k else "weight" for k, m in objective.model.named_modules() if isinstance(m, nn.Linear)]
    if linear and linear[-1] in objective.names:
        layer = Hessian(objective.restrict_to([linear[-1]]))
        estimate = relative_flatness(layer, linear[-1], probes=budget.probes, seed=budget.seed)
        measures["relative_flatness"] = Measure.of_estimate(estimate, linear[-1])
    return top, measures


def _landscapes(objective: Objective, top: Eigenpairs, budget: Budget) -> tuple[Landscape | None, Landscape | None]:
    """Return the landscapes in random directions and along eigenvectors; None where there are no two directions."""
    if not budget.points:
        return None, None
    random = None
    if any(len(shape) > 1 for shape in objective.shapes):
        directions = random_directions(objective, seed=budget.seed)
        what = f"random, by filter, seed {budget.seed}"
        random = landscape(objective, directions, points=budget.points, radius=budget.radius, what=what)
    eigen = None
    if len(top.vectors) > 1:
        directions, what = _with_positive_sign(top.vectors[:2]), "the first two eigenvectors"
        eigen = landscape(objective, directions, points=budget.points, radius=budget.eigen_radius, what=what)
    return random, eigen


def _with_positive_sign(vectors: Tensor) -> Tensor:
    """Make the largest entry of each eigenvector positive, because its sign is arbitrary."""
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return vectors * largest.sign()


def _ascent_options(budget: Budget) -> dict[str, Any]:
    return {"ascent_steps": budget.ascent_steps, "restarts": budget.restarts, "seed": budget.seed}


def _ascent_note(restarts: tuple[float, ...]) -> str:
    """Describe how many ascents there were, and by how much their results differ."""
    best = max(restarts)
    apart = f", which differ by up to {1 - min(restarts) / best:.0%}" if min(restarts) < 0.95 * best < math.inf else ""
    return f"lower bound: the best of {len(restarts)} ascents{apart}"
