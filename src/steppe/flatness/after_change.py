"""The loss after a change of the weights that a use of the model brings: fewer bits, or training on another task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from torch import nn
from torch.optim import Optimizer

from steppe._checks import check_count
from steppe.flatness.objective import Objective
from steppe.flatness.quantization import rounded


@dataclass(frozen=True)
class LossChange:
    """The loss before and after a change of the weights."""

    before: float
    """L(w)."""
    after: float
    """L at the changed weights."""

    @property
    def increase(self) -> float:
        """after - before: smaller means flatter in the direction of the change."""
        return self.after - self.before


@dataclass(frozen=True)
class TrainingChange(LossChange):
    """The loss before and after training on another task, with the loss on that task.

    Compare two models only if both have learned the other task equally well: one that learns nothing keeps its loss.
    """

    other_before: float
    """The loss on the other task before the training."""
    other_after: float
    """The loss on the other task after it."""


def after_rounding(objective: Objective, bits: int, *, per_channel: bool = False) -> LossChange:
    """Measure the loss with weight matrices rounded to few bits: the flatness that quantization after training needs.

    Weights are rounded to the nearest of 2^bits - 1 equidistant values up to the largest in absolute value, as by
    :func:`~steppe.flatness.round_weights`. Parameters of fewer than two dimensions (biases, normalization layers) and
    those that are not among the weights of the objective are not rounded.

    Args:
        objective: The loss over the data.
        bits: Number of bits, at least 2.
        per_channel: Round each index of the first dimension, an output channel, by a step of its own.

    Returns:
        A :class:`LossChange`.

    Raises:
        ValueError: ``bits`` is below 2.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, 0.25]]))
        >>> objective = Objective(model, (torch.eye(2), torch.zeros(2, 1)), loss=nn.functional.mse_loss)
        >>> after_rounding(objective, bits=2)  # to -1, 0 and 1
        LossChange(before=0.53125, after=0.5)

    References:
        Liu et al. 2021, Sharpness-aware Quantization for Deep Neural Networks, https://arxiv.org/abs/2111.12273.
    """
    objective.stage = f"loss at {bits} bits"
    weights = objective.unflatten(objective.weights)
    nearest = [rounded(w, bits, per_channel=per_channel) if w.dim() >= 2 else w for w in weights]
    before = float(objective.loss())
    with objective.at_weights(objective.flatten(nearest)) as there:
        return LossChange(before, float(there.loss()))


def after_training(
    objective: Objective,
    other: Objective,
    *,
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    steps: int,
    batch_size: int = 64,
) -> TrainingChange:
    """Measure the loss after training on another task: the flatness on which forgetting depends.

    increase = L(w_steps) - L(w), for the weights w_steps after that many steps from w.

    The steps start at w, and use the batches of ``other`` in their order. The model is left unchanged. The loss is the
    function of the weights that the objectives define: in evaluation mode, with the running statistics of BatchNorm.

    Args:
        objective: The loss over the first task.
        other: The loss over the other task as a function of the same parameters of the same network.
        optimizer: Function of a list of parameters that returns an optimizer, the same for all models that are
            compared, for example ``lambda parameters: torch.optim.SGD(parameters, lr=0.01)``.
        steps: Number of steps.
        batch_size: Samples in a step.

    Returns:
        A :class:`TrainingChange`.

    Raises:
        ValueError: Objectives of other parameters, ``steps`` below 0, or no samples.
        TypeError: A model in ``DistributedDataParallel``.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> first, second = (
        ...     Objective(model, (torch.ones(1, 1), target), loss=nn.functional.mse_loss)
        ...     for target in (torch.ones(1, 1), torch.zeros(1, 1))
        ... )
        >>> after_training(first, second, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.25), steps=1)
        TrainingChange(before=0.0, after=0.25, other_before=1.0, other_after=0.25)

    References:
        Mirzadeh et al. 2020, Understanding the Role of Training Regimes in Continual Learning,
        https://arxiv.org/abs/2006.06958.
    """
    check_count("steps", steps, "the number of steps on the other task", at_least=0)
    if (objective.names, objective.shapes) != (other.names, other.shapes):
        raise ValueError(
            "other: its weights are other parameters than those of the objective, so they cannot be exchanged: use the "
            "same network, and the same parameters="
        )
    if other.group is not None:
        raise TypeError("other: the steps are those of one process, so its model must not be DistributedDataParallel")
    objective.stage = other.stage = "training on another task"
    weights = [nn.Parameter(w.clone()) for w in objective.unflatten(objective.weights)]
    before = [_loss_at(o, weights) for o in (objective, other)]
    stepper = optimizer(weights)
    for batch in islice(_repeated(other, batch_size), steps):
        with batch.at_weights(batch.flatten([w.detach() for w in weights])) as there:
            gradient = there.gradient()[1]
        for w, g in zip(weights, other.unflatten(gradient), strict=True):
            w.grad = g.clone()
        stepper.step()
    after = [_loss_at(o, weights) for o in (objective, other)]
    return TrainingChange(before[0], after[0], before[1], after[1])


def _repeated(objective: Objective, batch_size: int) -> Iterator[Objective]:
    """Yield the loss over each batch, epoch after epoch.

    Raises:
        ValueError: There are no samples.
    """
    while True:
        batches = 0
        for batch in objective.split(batch_size):
            batches += 1
            yield batch
        if batches == 0:
            raise ValueError("data: there are no samples, but a step needs at least one")


def _loss_at(objective: Objective, weights: list[nn.Parameter]) -> float:
    with objective.at_weights(objective.flatten([w.detach() for w in weights])) as there:
        return float(there.loss())
