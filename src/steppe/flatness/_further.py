"""Evaluate the measures that are made only where a budget names them, and check which ones a network allows."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.flatness.after_change import after_rounding
from steppe.flatness.batch_sharpness import batch_sharpness
from steppe.flatness.budget import Budget
from steppe.flatness.by_layer import by_layer
from steppe.flatness.eigenvalues import eigenvalues
from steppe.flatness.empirical_fisher import EmpiricalFisher
from steppe.flatness.families import FAMILIES, Measure, name_in_layer
from steppe.flatness.gauss_newton import GaussNewton
from steppe.flatness.objective import Objective
from steppe.flatness.operators import Hessian, Operator, Scaled
from steppe.flatness.preconditioner import adam_preconditioner
from steppe.flatness.stability import adam_edge_of_stability
from steppe.flatness.trace import trace

_BITS = 4  # at which rounding raises the loss of a usual network by more than noise


def check_measures(objective: Objective, budget: Budget, optimizer: Optimizer | None) -> None:
    """Raise the error of a measure that cannot be evaluated, from few samples: before the measures that take long.

    Raises:
        ValueError, TypeError, RuntimeError: As of :func:`measure`.
    """
    part = next(objective.split(budget.m), None)
    if part is not None:  # else the first pass over the data says so
        for matrix in (Hessian, *_matrices(objective, budget).values()):
            matrix(part)(torch.zeros(1, part.n, dtype=part.dtype, device=part.device))
    if "adam_sharpness" in budget.names_of_further:
        _adam_preconditioner(objective, optimizer)


def further_measures(objective: Objective, budget: Budget, optimizer: Optimizer | None) -> dict[str, Measure]:
    """Return the measures that the budget names."""
    measures, names = {}, budget.names_of_further
    if "batch_sharpness" in names:
        measures["batch_sharpness"] = Measure.of_parts(batch_sharpness(objective, budget.m), budget.m)
    if "rounding" in names:
        measures["rounding"] = Measure(after_rounding(objective, _BITS).increase)
    for name, matrix in _matrices(objective, budget).items():
        objective.stage = FAMILIES["further"].measures[name]
        operator = matrix(objective)
        top = eigenvalues(operator, k=min(budget.num_eigenvalues, objective.n), tol=budget.tol, seed=budget.seed)
        measures[name] = Measure.of_eigenvalue(top)
        total = trace(operator, probes=budget.probes, top=top, seed=budget.seed)
        measures[f"{name}_trace"] = Measure.of_estimate(total)
    if "adam_sharpness" in names:
        measures["adam_sharpness"] = _adam_sharpness(objective, budget, optimizer)
    if "by_layer" in names:
        for row in by_layer(objective, probes=budget.probes, tol=budget.tol, seed=budget.seed):
            measures[name_in_layer("lambda_max", row.layer)] = row.lambda_max
            measures[name_in_layer("trace", row.layer)] = Measure.of_estimate(row.trace)
            if row.relative_flatness is not None:
                measures[name_in_layer("relative_flatness", row.layer)] = Measure.of_estimate(row.relative_flatness)
    return measures


def _matrices(objective: Objective, budget: Budget) -> dict[str, Callable[[Objective], Operator]]:
    """Return the matrices among the further measures that the budget names."""
    per: Literal["sample", "token"] = "token" if objective.weighted_by == "tokens" else "sample"
    matrices: dict[str, Callable[[Objective], Operator]] = {
        "gauss_newton": GaussNewton,
        "fisher": partial(EmpiricalFisher, per=per),
    }
    return {name: matrix for name, matrix in matrices.items() if name in budget.names_of_further}


def _adam_sharpness(objective: Objective, budget: Budget, optimizer: Optimizer | None) -> Measure:
    """Return the largest eigenvalue of P^-1 H, with its edge of stability at the highest learning rate."""
    preconditioner = _adam_preconditioner(objective, optimizer)
    assert optimizer is not None
    objective.stage = FAMILIES["further"].measures["adam_sharpness"]
    operator = Scaled(Hessian(objective), preconditioner.rsqrt())
    found = Measure.of_eigenvalue(eigenvalues(operator, tol=budget.tol, seed=budget.seed))
    group = max(optimizer.param_groups, key=_first_rate)
    lr, beta1 = _first_rate(group), float(group["betas"][0])
    edge = adam_edge_of_stability(lr, beta1=beta1) if lr > 0 else math.inf
    note = f"edge of stability {edge:.3g} at lr {lr:.3g}"
    return Measure(found.value, found.error, "; ".join(filter(None, [note, found.note])))


def _adam_preconditioner(objective: Objective, optimizer: Optimizer | None) -> Tensor:
    if optimizer is None:
        raise ValueError(
            "adam_sharpness is the curvature in the metric of Adam, whose averages of the gradients are not known: "
            "measure the runs of a folder that Adam or AdamW has trained, or pass optimizer= in Python"
        )
    return adam_preconditioner(optimizer, objective)


def _first_rate(group: dict[str, Any]) -> float:
    """Return the learning rate before a schedule changed it: at the end of one, it is often 0."""
    return float(group.get("initial_lr", group["lr"]))
