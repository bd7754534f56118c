"""Sharpness: how much higher the loss is at the worst place near the weights."""

import math
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
import torch.distributed as dist
from torch import Tensor

from steppe._tensors import ops as tensors
from steppe._tensors import random as random_tensors
from steppe.flatness.ascent import Ball, Norm, Seen, Surface, ascend, finite, highest, metric
from steppe.flatness.objective import Objective
from steppe.flatness.values import Estimate


@dataclass(frozen=True)
class Sharpness:
    """The highest rise of the loss that was found in a ball around the weights, and how it was found."""

    value: float
    """L(w + e) - L(w) at the best e: a lower bound of S(w); never below 0, and inf where the loss is."""
    first_order: float
    """What the gradient alone promises: rho |g|, in the dual norm (adaptive: of T g)."""
    one_step: float
    """The rise at the point to which SAM (adaptive: ASAM) climbs, e = rho g / |g|."""
    restarts: tuple[float, ...]
    """The best rise of each restart, the one along the gradient first. Where they differ much, take more of them."""
    loss: float
    """L(w)."""
    gradient_norm: float
    """|g|, the L2 norm of the gradient at w."""
    rho: float
    """The radius."""
    e: Tensor = field(repr=False, compare=False)
    """The best displacement, (n,)."""
    passes: int = 0
    """Passes over the data."""


@dataclass(frozen=True)
class MSharpness(Estimate):
    """The mean of the parts' own sharpness; ``n`` counts the parts, and the standard error is over them."""

    one_step: Estimate
    """The same mean of the rises at each part's own SAM point."""
    samples: int
    """In all parts together."""


def sharpness(
    objective: Objective,
    rho: float,
    *,
    steps: int = 20,
    restarts: int = 5,
    seed: int = 0,
    adaptive: bool = False,
    norm: Norm = "l2",
    eta: float = 0.0,
) -> Sharpness:
    """Climb to the highest loss in a ball around the weights: S(w) = max over |T^-1 e| <= rho of L(w + e) - L(w).

    T = 1, or, adaptive, T = |w| + eta. The climb is in z = T^-1 e, so nothing is divided by a weight. With eta = 0 a
    weight that is exactly zero does not move, and S(w) is the same for all rescalings of a ReLU network that leave its
    function as it is. With eta > 0 (ASAM's 0.01) every weight can move, and rescaling changes S(w) somewhat.

    The maximum is not known in general, and what is found is a lower bound: the best place on ``restarts`` climbs, the
    first from w along the gradient, so by way of SAM's own point, the others from random places on the ball's border.
    Each is a projected ascent of ``steps`` passes with the step length of Barzilai and Borwein, and with an infinite
    one where the loss curves upward. Where the gradient is zero, only random places lead upward.

    Args:
        objective: the loss over the data, at the weights as they are.
        rho: the radius: of e itself, or, adaptive, relative to the weights.
        steps: passes over the data in each climb.
        restarts: climbs.
        seed: of the random places.
        adaptive: whether to measure e relative to the weights (ASAM).
        norm: "l2", or "linf" for the largest entry, whose radii are far smaller.
        eta: what is added to |w| in T.

    Returns:
        A :class:`Sharpness`, after 1 + steps * restarts passes, or fewer where a climb has come to rest.

    Raises:
        ValueError: a radius or number that is not positive, eta without ``adaptive``.
        FloatingPointError: the loss is infinite at w, or it or its gradient is NaN somewhere: a maximum over such a
            ball does not exist. An infinite loss elsewhere is not an error; the sharpness is infinite then.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
    >>> round(sharpness(objective, rho=0.5).value, 4)  # 1/2 lambda_max rho^2, with H = diag(1, 4)
    0.5

    Source: Foret et al., arXiv 2010.01412; adaptive: Kwon et al., arXiv 2102.11600; the step length: Birgin, Martinez
    and Raydan, Nonmonotone Spectral Projected Gradient Methods on Convex Sets, SIAM J. Optim. 10, 2000.
    """
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps}, restarts={restarts}: a climb needs at least one step, and there must be one")
    ball, T = Ball(rho, norm), metric(objective, adaptive, eta)
    objective.stage, before = "sharpness", objective.passes
    loss, gradient = objective.gradient()
    surface = Surface(objective, T, finite(loss))
    g = surface.upward(T * gradient, 0.0)

    here = Seen(0.0, torch.zeros_like(gradient))
    along = ascend(surface, ball, here, g, steps)
    one_step = next(along, here)
    best = [highest(chain((here, one_step), along))]
    for restart in range(1, restarts):
        (x,) = random_tensors.normal("steppe.sharpness", seed, restart, [gradient])
        start, g_there = surface(x * (rho / ball.length(x)))
        best.append(highest(chain((start,), ascend(surface, ball, start, g_there, steps - 1))))
    found = highest(best)
    return Sharpness(
        value=found.rise,
        first_order=rho * ball.dual(g),
        one_step=one_step.rise,
        restarts=tuple(seen.rise for seen in best),
        loss=surface.loss,
        gradient_norm=float(tensors.norm([gradient])),
        rho=rho,
        e=T * found.z,
        passes=objective.passes - before,
    )


def m_sharpness(
    objective: Objective,
    rho: float,
    m: int,
    *,
    parts: int | None = None,
    steps: int = 20,
    restarts: int = 5,
    seed: int = 0,
    adaptive: bool = False,
    norm: Norm = "l2",
    eta: float = 0.0,
) -> MSharpness:
    """Average the sharpness of parts of m samples: S_m(w) = mean over parts P of max_e L_P(w + e) - L_P(w).

    Each part has an e of its own, as each batch has in training, so S_m(w) >= S(w), and m = N is S(w). Parts count by
    their samples, and lie within one batch: its last one may be smaller. In a ``DistributedDataParallel`` model the
    mean is over the parts of all ranks. With ``batch_norm="train"``, a part is normalized by its own statistics.

    Args:
        objective: the loss over the data.
        rho: the radius.
        m: samples in a part.
        parts: how many to measure, the first ones (of each rank); by default all.
        steps: as for :func:`sharpness`; with ``steps=1, restarts=1``, SAM's one step, a part costs two passes over it.
        restarts: as there, and so are the other options.
        seed: as there.
        adaptive: as there.
        norm: as there.
        eta: as there.

    Raises:
        ValueError: m is below 1 or larger than a batch, and what :func:`sharpness` raises.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(model, (x, y), loss=torch.nn.functional.mse_loss)
    >>> round(m_sharpness(objective, rho=0.5, m=1).value, 4)  # 1/2 rho^2 times the mean of 2 and 8
    0.625

    Source: Foret et al., arXiv 2010.01412, section 4.
    """
    if parts is not None and parts < 1:
        raise ValueError(f"parts={parts}: a mean needs at least one part")
    options = {"steps": steps, "restarts": restarts, "seed": seed, "adaptive": adaptive, "norm": norm, "eta": eta}
    found: list[tuple[int, float, float]] = []
    for part in islice(objective.apart(m), parts):
        if not found and part.samples < m:
            raise ValueError(
                f"m={m}, and a batch has {part.samples} samples: a part lies within one batch, so make them larger "
                "(batch_size=)"
            )
        own = sharpness(part, rho, **options)  # type: ignore[arg-type]
        found.append((part.samples, own.value, own.one_step))
    if objective.group is not None:
        everyone: list[list[tuple[int, float, float]]] = [[]] * dist.get_world_size(objective.group)
        dist.all_gather_object(everyone, found, group=objective.group)
        found = [one for rank in everyone for one in rank]
    if not found:
        raise ValueError("data: there are no samples, and a mean needs some")
    sizes, values, one_steps = (torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True))
    mean, one_step = _weighted(values, sizes), _weighted(one_steps, sizes)
    return MSharpness(mean.value, mean.error, mean.n, one_step, int(sizes.sum()))


def _weighted(values: Tensor, sizes: Tensor) -> Estimate:
    """The mean over samples, with its standard error over parts; for parts of one size, :meth:`Estimate.of`."""
    weights, n = sizes / sizes.sum(), len(values)
    mean = (weights * values).sum()
    error = ((weights * (values - mean)).square().sum() * n / (n - 1)).sqrt() if n > 1 else math.nan
    return Estimate(float(mean), float(error), n)
