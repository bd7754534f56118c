"""The preconditioner of Adam, in whose metric its stability is decided."""

from typing import Any

from torch import Tensor

from steppe.flatness.objective import Objective


def adam_preconditioner(optimizer: Any, objective: Objective) -> Tensor:
    """Return the diagonal of P = (1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps) of the last step of Adam, (n,).

    Adam's step is -lr P^-1 m, with its averages m of the gradients and v of their squares. It is stable where the
    preconditioned sharpness, the largest eigenvalue of P^-1 H, is below :func:`adam_edge_of_stability`. P^-1/2 H P^-1/2
    has the same eigenvalues, and is symmetric: ``Scaled(hessian, preconditioner.rsqrt())``.

    Args:
        optimizer: ``torch.optim.Adam`` or ``AdamW`` of the objective's model, after a step, or a SAM around it.
        objective: The loss whose weights the entries belong to.

    Returns:
        The diagonal of P, of the objective's dtype.

    Raises:
        ValueError: An optimizer without the state of Adam for one of the weights, NAdam and RAdam, or a P of 0 in an
            entry.

    Example:
        >>> import torch
        >>> from steppe.flatness import Hessian, Scaled, adam_edge_of_stability, eigenvalues
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1)
        >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> torch.nn.functional.mse_loss(model(x), y).backward()
        >>> optimizer.step()
        >>> P = adam_preconditioner(optimizer, objective)
        >>> sharpness = eigenvalues(Scaled(Hessian(objective), P.rsqrt())).values[0]
        >>> bool(sharpness < adam_edge_of_stability(0.01))
        True

    References:
        Cohen et al. 2022, Adaptive Gradient Methods at the Edge of Stability, https://arxiv.org/abs/2207.14484.
    """
    kind = type(getattr(optimizer, "base", optimizer)).__name__
    if kind in ("NAdam", "RAdam"):  # their state has the same names
        raise ValueError(
            f"the optimizer is {kind}, whose step is not -lr P^-1 m with the P of Adam, so that Adam's edge of "
            "stability is not its own: measure a model that Adam or AdamW trains"
        )
    parameters = dict(objective.model.named_parameters())
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    diagonals = [_diagonal(name, optimizer, groups.get(parameters[name]), parameters[name]) for name in objective.names]
    preconditioner = objective.flatten(diagonals)
    if bool((preconditioner <= 0).any()):
        raise ValueError(
            "the preconditioner of Adam is 0 in some entries, whose gradients were all 0 and eps=0: P^-1 does not exist"
        )
    return preconditioner


def _diagonal(name: str, optimizer: Any, group: dict[str, Any] | None, parameter: Tensor) -> Tensor:
    state = optimizer.state.get(parameter, {}) if group is not None else {}
    if group is None or "exp_avg_sq" not in state or "betas" not in group:
        raise ValueError(
            f"{name} has no state of Adam (exp_avg_sq) in this {type(optimizer).__name__}: pass the Adam or AdamW that "
            "trains this model, after at least one step"
        )
    beta1, beta2 = (float(beta) for beta in group["betas"])
    t = float(state["step"])
    v: Tensor = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"].detach().double()
    first, second = float(1 - beta1**t), float(1 - beta2**t)
    return first * ((v / second).sqrt() + float(group["eps"]))
