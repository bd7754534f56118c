"""Unified SAM: between SAM, whose perturbation has a fixed length, and USAM, where it has that of rho g."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Unpack

from steppe._checks import check_unit_interval
from steppe.methods._card import COPY, Comparison, MethodCard
from steppe.methods._options import Base, Options, Rho
from steppe.papers import ICLR, Paper
from steppe.rules import Point, ScaledDirection
from steppe.rules.ops import reciprocal
from steppe.sam import SAM

UNIFIED_SAM_PAPER = Paper(
    "oikonomou2025unified",
    ("Dimitris Oikonomou", "Nicolas Loizou"),
    "Sharpness-Aware Minimization: General Analysis and Improved Rates",
    "2503.02225",
    2025,
    ICLR,
)

_SCHEDULES: Mapping[str, Callable[[int], float]] = MappingProxyType(
    {"1/t": lambda t: 1 / t, "1-1/t": lambda t: 1 - 1 / t}
)


@dataclass(frozen=True)
class PartlyNormalized:
    """Perturb along the gradient, normalized in part (Unified SAM): e = rho (1 - lambda + lambda / |g|) g.

    lambda = 1 is SAM, of length rho. lambda = 0 is unnormalized SAM (USAM), e = rho g: the perturbation vanishes with
    the gradient, and depends on the scale of the loss. With the schedules ``"1/t"`` and ``"1-1/t"`` lambda changes from
    step to step, t = 1 at the first one: from SAM to USAM, and from USAM to SAM. A zero gradient gives e = 0.

    Example:
        >>> import torch
        >>> w, g = torch.zeros(2), torch.tensor([3.0, 4.0])
        >>> for lmbda in (1.0, 0.0, 0.5):
        ...     direction, scale = PartlyNormalized(lmbda)(Point([w], [g], rho=[0.1], base_state=[{}], step=0))
        ...     print(0.1 * scale * direction[0])
        tensor([0.0600, 0.0800])
        tensor([0.3000, 0.4000])
        tensor([0.1800, 0.2400])

    References:
        Oikonomou and Loizou, Sharpness-Aware Minimization: General Analysis and Improved Rates, arXiv 2503.02225.
    """

    paper: ClassVar[Paper] = UNIFIED_SAM_PAPER

    lmbda: float | str = "1-1/t"
    """lambda, the share of the normalized gradient, 0 to 1; or a schedule, "1/t" or "1-1/t"."""

    def __post_init__(self) -> None:
        if self.lmbda not in _SCHEDULES:
            meaning = "the share of the normalized gradient, or a schedule of it, '1/t' or '1-1/t'"
            check_unit_interval("lmbda", self.lmbda, meaning)  # type: ignore[arg-type]

    def __call__(self, point: Point) -> ScaledDirection:
        share = self.lmbda if not isinstance(self.lmbda, str) else _SCHEDULES[self.lmbda](point.step + 1)
        return ScaledDirection(point.gradients, (1 - share) + share * reciprocal(point.gradient_norm))


def unified_sam(
    base_optimizer: Base, rho: Rho = 0.1, *, lmbda: float | str = "1-1/t", **options: Unpack[Options]
) -> SAM:
    """Unified SAM: between SAM (lambda 1) and unnormalized SAM (lambda 0). Two passes per step.

    e = rho (1 - lambda + lambda / |g|) g.

    Args:
        base_optimizer: The optimizer that takes the steps.
        rho: rho, the radius of the neighborhood; 0.1 to 0.4 in the official code.
        lmbda: lambda, the share of the normalized gradient: 0 is USAM, and 1 is SAM. ``"1/t"`` goes from SAM to USAM,
            and ``"1-1/t"`` from USAM to SAM; t counts the optimizer's steps from 1.
        **options: ``model`` and the other options of :class:`steppe.SAM`; with a loss scaler, ``scaler`` is required.

    Raises:
        TypeError: lambda is neither a number nor a schedule.
        ValueError: lambda is out of range.

    Example:
        >>> import torch
        >>> unified_sam(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1), lmbda=0.5).perturbation
        PartlyNormalized(lmbda=0.5)

    References:
        Oikonomou and Loizou, Sharpness-Aware Minimization: General Analysis and Improved Rates, arXiv 2503.02225.
    """
    return SAM(base_optimizer, rho, **options, perturbation=PartlyNormalized(lmbda))


CARD = MethodCard(
    name="unified_sam",
    function=unified_sam,
    label="Unified SAM",
    paper=UNIFIED_SAM_PAPER,
    summary="Perturb along the gradient, normalized in part: lambda = 1 is SAM, and lambda = 0 unnormalized SAM "
    "(USAM). A schedule of lambda moves from one to the other.",
    equation="e = rho (1 - lambda + lambda / |g|) g\nlambda = 1 / t or 1 - 1 / t   with a schedule; t = 1, 2, ...",
    cost="2",
    passes=2,
    memory=COPY,
    when="To let the perturbation shrink with the gradient (lambda below 1).",
    when_not="Without a look at |g|: USAM's length is rho |g|, so its rho depends on the scale of the loss.",
    usual={
        "rho": "0.1 to 0.4 (official code)",
        "lmbda": "0, 0.5, 1, `'1/t'` and `'1-1/t'` in the official code, which calls the last one a strong default",
    },
    verified="official code, same steps",
    checked="https://github.com/dimitris-oik/unifiedsam (unifiedsam 1.0 on PyPI): 20 steps agree to 1e-11 for each "
    "lambda and both schedules. It adds 1e-12 to the norm.",
    caveats=(
        "In a loop with a loss scaler, give `scaler=`: for lambda below 1 the length of e depends on |g|.",
        "With `passes(accumulate=True)`, give the share of each micro-batch, `loss_weight=`.",
        "t counts the optimizer's steps, also those that a cadence does not perturb. With `'1-1/t'`, e is "
        "1 + (|g| - 1) / t times that of SAM.",
    ),
    comparison=Comparison(summary="moves from unnormalized SAM to SAM by a schedule of lambda, at SAM's rho"),
)
