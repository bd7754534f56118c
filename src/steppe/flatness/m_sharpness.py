"""m-sharpness: the mean of the sharpness of parts of m samples."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from steppe._checks import check_count
from steppe.flatness._ascent import Norm, naming_part
from steppe.flatness._batches import whole_if_possible
from steppe.flatness.estimate import Estimate, weighted_standard_error
from steppe.flatness.objective import Objective
from steppe.flatness.sharpness import sharpness


@dataclass(frozen=True)
class MSharpness(Estimate):
    """The mean sharpness of ``n`` parts, with its standard error over the parts."""

    one_step: Estimate
    """The mean loss increase of the parts at the perturbed weights of SAM, with one perturbation per part."""
    samples: float
    """Number of samples in all parts, or what else :attr:`Objective.weighted_by` names."""


def m_sharpness(
    objective: Objective,
    rho: float,
    m: int,
    *,
    parts: int | None = None,
    ascent_steps: int = 20,
    restarts: int = 5,
    seed: int = 0,
    adaptive: bool = False,
    norm: Norm = "l2",
    eta: float = 0.0,
) -> MSharpness:
    """Average the sharpness of parts of m samples: S_m(w) = mean over parts P of max_e L_P(w + e) - L_P(w).

    Each part has its own e, as each batch has in training, so S_m(w) >= S(w), with equality for m = N. Parts are
    weighted by their samples and lie within one batch, whose last part may be smaller. In a
    ``DistributedDataParallel`` model the mean is over the parts of all ranks. With ``batch_norm="train"`` a part is
    normalized by its own statistics.

    Args:
        objective: The loss over the data.
        rho: Radius of the ball.
        m: Samples per part.
        parts: Number of parts to measure, the first ones of each rank; by default all.
        ascent_steps: As in :func:`sharpness`. With ``ascent_steps=1, restarts=1``, the single step of SAM, a part costs
            two passes over it.
        restarts: As in :func:`sharpness`, like all following arguments.
        seed: Seed of the random starts.
        adaptive: Measure e relative to the weights.
        norm: "l2" or "linf".
        eta: Added to |w| in T.

    Returns:
        A :class:`MSharpness`.

    Raises:
        ValueError: ``m`` is below 1 or larger than a batch, or an argument that :func:`sharpness` rejects.
        FloatingPointError: As in :func:`sharpness`.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
        >>> round(m_sharpness(objective, rho=0.5, m=1).value, 4)  # 1/2 rho^2 times the mean of 2 and 8
        0.625

    References:
        Foret et al. 2021, Sharpness-Aware Minimization for Efficiently Improving Generalization, section 4,
        https://arxiv.org/abs/2010.01412.
    """
    if parts is not None:
        check_count("parts", parts, "the number of parts of the data in the mean")
    options: dict[str, Any] = {"ascent_steps": ascent_steps, "restarts": restarts, "seed": seed}
    options |= {"adaptive": adaptive, "norm": norm, "eta": eta}
    measured: list[tuple[float, float, float]] = []
    for part in islice(objective.split(m), parts):
        if not measured and part.rows < m:
            raise ValueError(
                f"m={m}, but a batch has {part.rows} samples and a part lies within one batch: choose a smaller m "
                "or larger batches (batch_size=)"
            )
        with naming_part(part):
            own = sharpness(part, rho, **options)
        measured.append((part.samples, own.value, own.one_step))
    measured = objective.gather(measured)
    if not measured:
        raise ValueError("data: there are no samples, but a mean needs at least one")
    sizes, values, one_steps = (torch.tensor(column, dtype=torch.float64) for column in zip(*measured, strict=True))
    mean, one_step = _weighted_mean(values, sizes), _weighted_mean(one_steps, sizes)
    return MSharpness(mean.value, mean.error, mean.n, one_step, whole_if_possible(float(sizes.sum())))


def _weighted_mean(values: Tensor, sizes: Tensor) -> Estimate:
    """Return the mean over samples with its standard error over parts: :meth:`Estimate.of` for parts of equal size."""
    weights = sizes / sizes.sum()
    mean = (weights * values).sum()
    return Estimate(float(mean), weighted_standard_error(weights * (values - mean)), len(values))
